"""Integers that are known beside fake tensors."""

import torch

from memlab.meters.cuda_stand_in import accelerator_stand_in
from memlab.meters.fake import FakeMode, Shapes
from memlab.meters.known import (
    fake_like,
    is_composed,
    is_known,
    may_make_integers,
    value_of,
)

RANGE = torch.ops.aten.arange.default


def shapes():
    return Shapes(lambda note: None, lambda device, made: None, {}, {})


def test_integers_of_the_host_are_real_and_those_of_the_gpu_know_their_value():
    with accelerator_stand_in(), FakeMode(), shapes():
        positions = torch.arange(6)
        assert is_known(positions) and value_of(positions.to("cuda")).tolist() == list(range(6))
        far = positions.to("cuda")
        assert far.device.type == "cuda"
        assert far[far > 3].shape == (2,)  # a shape that depends on values
        assert (far.max() + 1).item() == 6
        far[2] = 9
        assert value_of(far).tolist() == [0, 1, 9, 3, 4, 5]


def test_what_follows_from_numbers_is_not_known():
    with accelerator_stand_in(), FakeMode(), shapes():
        assert not is_known(torch.randn(3) > 0)
        assert not is_known(torch.randn(3))


def test_which_operators_make_integers_of_nothing():
    assert may_make_integers(RANGE, {})
    assert may_make_integers(torch.ops.aten.full.default, {"dtype": torch.int64})
    assert not may_make_integers(RANGE, {"dtype": torch.float32})
    assert not may_make_integers(torch.ops.aten.randn.default, {})


def test_fake_tensors_of_known_shapes():
    with accelerator_stand_in(), FakeMode():
        made = fake_like((torch.ones(2, 3), torch.ones(4)), torch.device("cuda", 0))
    assert [tuple(tensor.shape) for tensor in made] == [(2, 3), (4,)]


def test_an_operator_is_a_row_of_others_if_no_device_has_a_kernel_for_it():
    aten = torch.ops.aten
    assert is_composed(aten.linear.default) and is_composed(aten.reshape.default)
    assert not is_composed(aten.silu_backward.default) and not is_composed(aten.add.Tensor)
