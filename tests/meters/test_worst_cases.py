"""Where a size depends on values: the largest one, said, or a refusal."""

import pytest
import torch

from memlab.meters.worst_cases import worst_case

aten = torch.ops.aten


def shapes_of(operator, *arguments, **keywords):
    notes = []
    result = worst_case(operator, arguments, keywords, notes.append)
    tensors = result if isinstance(result, tuple) else (result,)
    return [tuple(tensor.shape) for tensor in tensors], notes


def x(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("operator", "arguments", "shapes", "sentence"),
    [
        (aten.nonzero.default, (x(3, 4),), [(12, 2)], "nonzero() has a result"),
        (aten.masked_select.default, (x(3, 1), x(3, 4)), [(12,)], "masked_select()"),
        (aten._unique2.default, (x(3, 4),), [(12,), (0,), (0,)], "unique()"),
        (aten._unique2.default, (x(3, 4), True, True, True), [(12,), (3, 4), (12,)], "different"),
        (aten.unique_dim.default, (x(3, 4), 1, True, True), [(3, 4), (4,), (0,)], "unique_dim()"),
        (
            aten.unique_consecutive.default,
            (x(6), True, True),
            [(6,), (6,), (6,)],
            "unique_consecutive()",
        ),
        (aten.index.Tensor, (x(3, 4, 5), [x(3, 4, dtype=torch.bool)]), [(12, 5)], "index()"),
        (aten.index.Tensor, (x(3, 4), [None, x(4, dtype=torch.bool)]), [(3, 4)], "all elements"),
    ],
)
def test_the_largest_result_is_taken_and_said(operator, arguments, shapes, sentence):
    found, notes = shapes_of(operator, *arguments)
    assert found == shapes
    assert len(notes) == 1 and sentence in notes[0]


def test_without_a_bound_it_is_refused_with_its_name_and_what_to_do():
    with pytest.raises(NotImplementedError, match=r"bincount\(\).*scatter_add_.*measure the run"):
        shapes_of(aten.bincount.default, x(3, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match=r"repeat_interleave\(\).*output_size="):
        shapes_of(aten.repeat_interleave.Tensor, x(3, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match=r"linalg_lstsq\(\).*fixed size"):
        shapes_of(aten.linalg_lstsq.default, x(3, 3), x(3, 3))
