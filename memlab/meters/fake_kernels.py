"""Operators whose fake kernel in PyTorch does not do, on any device, and what stands in for it."""

from __future__ import annotations

from collections.abc import Callable

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


def _loss(reduction_at: int) -> Callable[..., Tensor]:
    """A loss whose sum or mean is written into the tensor of its terms, and keeps all their bytes.

    mse_loss and smooth_l1_loss: `build_borrowing_binary_op(maybe_get_output(), ...)` in
    ATen/native/BinaryOps.cpp, and `mean_out` into that in Loss.cpp. binary_cross_entropy:
    `loss.resize_as_(loss_reduced)` in Loss.cpp and cuda/Loss.cu.

    Args:
        reduction_at: the reduction's place among the arguments.
    """

    def loss(*arguments: object, **keywords: object) -> Tensor:
        reduction = arguments[reduction_at] if len(arguments) > reduction_at else 1
        reduction = keywords.get("reduction", reduction)
        shape = torch.broadcast_shapes(arguments[0].shape, arguments[1].shape)
        terms = arguments[0].new_empty(shape, dtype=torch.result_type(*arguments[:2]))
        return terms if reduction == 0 else terms.as_strided((), ())

    return loss


KERNELS = {
    aten._grouped_mm.default: _grouped_mm,
    aten.mse_loss.default: _loss(2),
    aten.smooth_l1_loss.default: _loss(2),
    aten.binary_cross_entropy.default: _loss(3),
}

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
