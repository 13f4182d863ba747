"""Operators whose result's size depends on values: what it can be at most.

A run on shapes has no values. So the largest result is taken, and noted. Where no bound is known,
the operator is refused: a number without a ground would be worse than none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

aten = torch.ops.aten


def worst_case(
    operator: object, arguments: tuple, keywords: dict, note: Callable[[str], None]
) -> object:
    """Return the largest result that an operator can have.

    Args:
        operator: the operator that has no shape without values.
        arguments: of the call.
        keywords: of the call.
        note: called with a sentence that says what was assumed.

    Raises:
        NotImplementedError: there is no worst case for this operator.
    """
    rule = _WORST.get(operator)
    name = operator.__name__.split(".")[0].strip("_").rstrip("2")
    if rule is None:
        remedy = _REMEDIES.get(operator, "Replace it in the run by something of a fixed size")
        raise NotImplementedError(
            f"{name}() makes a tensor whose size depends on values, and a prediction has none."
            f" {remedy}, or measure the run on the GPU"
        )
    result, sentence = rule(*arguments, **keywords)
    note(f"{name}() has a result whose size depends on values: {sentence}")
    return result


_EVERY = "all elements were taken"


def _nonzero(tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
    found = tensor.new_empty((tensor.dim(), tensor.numel()), dtype=torch.int64)
    return found.t(), _EVERY  # CUDA's result, too, is the transposed one


def _masked_select(tensor: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, str]:
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return tensor.new_empty(shape).flatten(), _EVERY


def _unique(
    tensor: torch.Tensor,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[tuple, str]:
    count = tensor.numel()
    return _unique_of(tensor, (count,), tensor.shape, return_inverse, return_counts)


def _unique_consecutive(
    tensor: torch.Tensor,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> tuple[tuple, str]:
    if dim is None:
        return _unique(tensor, True, return_inverse, return_counts)
    return _unique_dim(tensor, dim, True, return_inverse, return_counts)


def _unique_dim(
    tensor: torch.Tensor,
    dim: int,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[tuple, str]:
    length = (tensor.shape[dim],)
    return _unique_of(tensor, tensor.shape, length, return_inverse, return_counts, length)


def _unique_of(
    tensor: torch.Tensor,
    shape: tuple,
    inverse: tuple,
    return_inverse: bool,
    return_counts: bool,
    counts: tuple | None = None,
) -> tuple[tuple, str]:
    def integers(size: tuple, wished: bool) -> torch.Tensor:
        return tensor.new_empty(size if wished else (0,), dtype=torch.int64)

    found = (
        tensor.new_empty(shape),
        integers(inverse, return_inverse),
        integers(counts or shape, return_counts),
    )
    return found, "all are different"


def _index(tensor: torch.Tensor, indices: list[torch.Tensor | None]) -> tuple[torch.Tensor, str]:
    """A mask becomes as many lists of places as it has axes."""
    places: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            every = index.new_empty(index.numel(), dtype=torch.int64)
            places += [every] * index.dim()
        else:
            places.append(index)
    return aten.index.Tensor(tensor, places), _EVERY


_WORST: dict[object, Callable] = {
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _masked_select,
    aten.index.Tensor: _index,
    aten._unique2.default: _unique,
    aten.unique_consecutive.default: _unique_consecutive,
    aten.unique_dim.default: _unique_dim,
}

_REMEDIES = {
    aten.repeat_interleave.Tensor: "Say repeat_interleave(..., output_size=)",
    aten.bincount.default: "Write it with torch.zeros(length).scatter_add_()",
}
