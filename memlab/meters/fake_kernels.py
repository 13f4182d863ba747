"""Operators whose fake kernel in PyTorch does not do, on any device, and what stands in for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

aten = torch.ops.aten


def _grouped_mm(
    first: Tensor,
    second: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A product of matrices for each group of rows, as experts have it.

    The fake kernel takes BF16 only. The real ones take any type (`_grouped_mm_fallback` in
    ATen/native/GroupedMMUtils.h), and give rows of a multiple of 16 bytes
    (`create_grouped_gemm_output_tensor` there).
    """
    dtype = out_dtype or first.dtype
    columns = second.shape[-1]
    if first.dim() == 2 and second.dim() == 2:
        shape = (offs.shape[0], first.shape[0], columns)
    elif first.dim() == 2:
        shape = (first.shape[0], columns)
    elif second.dim() == 2:
        shape = (first.shape[1], columns)
    else:
        shape = (first.shape[0], first.shape[1], columns)
    places = 16 // dtype.itemsize
    padded = -(-columns // places) * places
    return first.new_empty((*shape[:-1], padded), dtype=dtype)[..., :columns]


KERNELS = {aten._grouped_mm.default: _grouped_mm}

#: The operators that are given a storage.
SET_STORAGE = {
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
}


def set_storage(operator: object, arguments: tuple, keywords: dict) -> object:
    """Give a tensor a storage. (Fake mode's cache of calls would hold that for ever.)"""
    mode = getattr(arguments[0], "fake_mode", None)
    if mode is None:
        return operator(*arguments, **keywords)
    before, mode.cache_enabled = mode.cache_enabled, False
    try:
        return operator(*arguments, **keywords)
    finally:
        mode.cache_enabled = before


def copy_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """What pinning makes. (CUDA's allocator of pinned memory may take more: a power of two.)"""
    if type(tensor) is FakeTensor:
        return torch.empty_like(tensor)
    with unset_fake_temporarily():
        return tensor.clone()
