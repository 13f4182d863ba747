"""Sums of gradients: backward adds the second to the first in place, where nobody else holds that.

PyTorch's engine does so with plain tensors, and never with fake ones (`can_accumulate_inplace` in
torch/csrc/autograd/input_buffer.cpp). So on fake tensors each sum makes a storage that a real run
does not make. Here it is taken for the first gradient's, if that one goes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.graph import _engine_run_backward

aten = torch.ops.aten

# What some formulas of backward do in place, into zeros that they have just made, unless a tensor
# is of a subclass (`areAnyTensorSubclassLike` in FunctionsManual.cpp, TensorAdvancedIndexing.cpp).
_INTO_ZEROS = (aten.index_put.default, aten.index_add.default, aten.scatter_add.default)

# What stands between the engine and a mode's `__torch_dispatch__`.
_BETWEEN = ("torch/_compile.py", "torch/_dynamo/eval_frame.py")


class Made(NamedTuple):
    """A storage that the run made, or one that is gone (`size` is negative)."""

    time: int
    address: int
    size: int
    dtype: str = ""
    shape: tuple[int, ...] | None = None


class Sums:
    """Hands on what was made and is gone, without the sums that are made in place.

    Args:
        on_event: called with a device's type and what was made or is gone there.
    """

    def __init__(self, on_event: Callable[[str, Made], None]):
        self._on_event = on_event
        self._waiting: list[tuple[str, Made]] = []
        self._first = 0  # the address of the first gradient of the sum that waits
        self._places: dict[int, tuple[int, int]] = {}  # of sums: whose storage they are in

    def place_of(self, address: int) -> int:
        """Where a storage really is."""
        return self._places[address][0] if address in self._places else address

    def made(self, device: str, made: Made, *, sum_with: int = 0) -> None:
        """Hand on a new storage.

        Args:
            device: where it is.
            made: what was made.
            sum_with: the address of the gradient that it may be in the place of (0: it is no sum).
        """
        self.settle()
        if sum_with:
            self._waiting = [(device, made)]
            self._first = sum_with
        else:
            self._on_event(device, made)

    def gone(self, device: str, gone: Made) -> None:
        """Hand on that a storage is gone."""
        if gone.address == self._first:
            # The engine alone held it. The sum takes its place.
            (_, made), *others = self._waiting
            self._places[made.address] = self._places.pop(gone.address, (gone.address, -gone.size))
            self._waiting = others
            self.settle()
            return
        if gone.address in self._places:
            address, size = self._places.pop(gone.address)
            gone = gone._replace(address=address, size=-size)
        if self._waiting:
            self._waiting.append((device, gone))
        else:
            self._on_event(device, gone)

    def settle(self) -> None:
        """Hand on what waits: the next operator runs, so somebody holds the first gradient."""
        if self._first or self._waiting:
            waiting, self._waiting, self._first = self._waiting, [], 0
            for device, made in waiting:
                self._on_event(device, made)


def is_gradient_sum(operator: object, arguments: tuple) -> bool:
    """Whether an operator's call is the engine's, to add a gradient to another one.

    It adds in place what is dense, of one type and shape, and only where no gradient of the
    gradient is wanted.
    """
    if torch.is_grad_enabled():
        return False
    if operator in _INTO_ZEROS:
        zeros = arguments[0]
        return not zeros._is_view() and _is_dense(zeros) and _engine_asks()
    if operator is not aten.add.Tensor:
        return False
    first, second = arguments
    if not isinstance(second, torch.Tensor) or first.shape != second.shape:
        return False
    alike = first.dtype is second.dtype and first.device == second.device
    shared = first.untyped_storage() is second.untyped_storage()
    # (A view holds what it is a view of: the engine is not the storage's only holder.)
    return alike and not shared and not first._is_view() and _is_dense(first) and _engine_asks()


def _is_dense(tensor: torch.Tensor) -> bool:
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == reach + 1


def _engine_asks() -> bool:
    """Whether no line of Python is between the engine and the operator, as one is in a hook or in
    the backward of a function written in Python.
    """
    frame = sys._getframe(3)  # who called the mode's `__torch_dispatch__`
    while frame is not None and frame.f_code.co_filename.endswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_code is _engine_run_backward.__code__
