"""Each storage of a run on fake tensors is noted, with its end."""

import gc

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from memlab.meters.cuda_stand_in import accelerator_stand_in
from memlab.meters.fake import FakeMode, Shapes


def record(run):
    made, notes = [], []
    shapes = Shapes(notes.append, lambda device, event: made.append((device, event)), {}, {})
    with accelerator_stand_in(), FakeMode(), shapes:
        result = run()
    del result
    gc.collect()
    return made, notes, shapes


def test_a_storage_is_noted_once_and_its_end():
    def run():
        numbers = torch.empty(100, device="cuda")
        view = numbers.view(10, 10).t()
        return view + 1

    made, notes, _ = record(run)
    assert [(device, event.size) for device, event in made] == [
        ("cuda", 400),
        ("cuda", 400),
        ("cuda", -400),
        ("cuda", -400),
    ]
    assert [event.time for _, event in made] == sorted({event.time for _, event in made})
    assert made[0][1].dtype == "float32" and made[0][1].shape == (100,)
    assert notes == []


def test_host_and_gpu_are_told_apart():
    made, _, _ = record(lambda: torch.zeros(8).to("cuda"))
    assert [(device, event.size) for device, event in made] == [
        ("cpu", 32),
        ("cuda", 32),
        ("cpu", -32),
        ("cuda", -32),
    ]


def test_values_that_are_asked_for_are_assumed_and_noted():
    answers = []

    def run():
        loss = torch.randn(4, device="cuda").sum()
        answers.append(loss.item())
        answers.append(bool(torch.isnan(loss).any()))
        answers.append(bool(torch.isfinite(loss).all()))
        answers.append(torch.equal(loss, loss + 1))

    _, notes, _ = record(run)
    assert answers == [1.0, False, True, True]
    assert notes == [
        "a value that the run asks for (`.item()`): taken as 1",
        "torch.equal() of two tensors without values: taken as equal",
    ]


def test_a_scaled_gradient_is_finite():
    def run():
        parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
        parameter.grad = torch.ones(3, device="cuda")
        infinite = torch.full((1,), 0.0, device="cuda")
        scale = torch.ones(1, device="cuda")
        torch._amp_foreach_non_finite_check_and_unscale_([parameter.grad], infinite, scale)
        assert infinite.item() == 0.0

    assert record(run)[1] == []


def test_progress_is_told():
    told = []

    def run():
        shapes.on_progress = told.append
        tensor = torch.ones(1)
        for _ in range(1000):
            tensor = tensor + 1

    shapes = Shapes(lambda note: None, lambda device, event: None, {}, {})
    with FakeMode(), shapes:
        run()
    assert told == [1000]


def test_a_model_from_before_is_refused_and_stays_what_it_was():
    layer = torch.nn.Linear(2, 2)
    before = layer.weight
    with pytest.raises(ValueError, match="built before the prediction began"):
        record(lambda: layer.to("cuda"))
    assert layer.weight is before and type(layer.weight) is torch.nn.Parameter
    assert layer(torch.ones(1, 2)).shape == (1, 2)


def test_a_tensor_made_of_others_calls_its_own_operators():
    """A class with `__torch_dispatch__` of its own: what it makes inside is seen."""

    def run():
        inner = torch.zeros(4)
        return TwoTensor(inner, inner + 1) * 2

    made, _, _ = record(run)
    assert sum(event.size for _, event in made if event.size > 0) == 4 * 16
