"""Integers that a run on fake tensors knows: a fake tensor of integers may carry its value.

The value is a tensor on the host, `FakeTensor.memlab_value`. It is not one of the run's own.
"""

from __future__ import annotations

from functools import cache

import torch
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor

from memlab.meters.live import tensors_in

#: The data types that decide about shapes.
INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def value_of(tensor: FakeTensor) -> torch.Tensor | None:
    """The value of a fake tensor, if it is known."""
    return getattr(tensor, "memlab_value", None)


def is_known(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of integers, and they are known."""
    if tensor.dtype not in INTEGERS:
        return False
    return type(tensor) is not FakeTensor or value_of(tensor) is not None


def may_make_integers(operator: object, keywords: dict) -> bool:
    """Whether an operator that is given no tensor makes one of integers."""
    dtype = keywords.get("dtype")
    if dtype is not None:
        return dtype in INTEGERS
    return operator.__name__.split(".")[0] in ("arange", "randint", "randperm")


def values_of(nested: object) -> object:
    """The same arguments, with the value of each fake tensor in its place."""
    if isinstance(nested, FakeTensor):
        return value_of(nested)
    if isinstance(nested, (list, tuple)):
        return type(nested)(values_of(entry) for entry in nested)
    if isinstance(nested, dict):
        return {name: values_of(entry) for name, entry in nested.items()}
    return nested


def give_values(result: object, value: object) -> None:
    for tensor, known in zip(tensors_in(result), tensors_in(value), strict=True):
        if type(tensor) is FakeTensor:
            tensor.memlab_value = known


def fake_like(value: object, device: torch.device) -> object:
    """Fake tensors of the shapes of real ones."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=device)
    return type(value)(fake_like(entry, device) for entry in value)


@cache
def is_composed(operator: object) -> bool:
    """Whether an operator is a row of others, on every device."""
    if operator.namespace == "prim":  # what TorchScript asks: `tensor.device`
        return False
    composed = DispatchKey.CompositeImplicitAutograd
    if operator.has_kernel_for_dispatch_key(DispatchKey.CPU):
        return False  # it has a kernel of its own beside the row, as the backward of SiLU
    # A row that is written in Python is for compilers.
    return operator.has_kernel_for_dispatch_key(composed) and composed not in operator.py_kernels
