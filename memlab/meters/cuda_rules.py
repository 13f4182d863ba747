"""Where CUDA chooses otherwise than PyTorch does for fake tensors of a CUDA device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from memlab.meters.gpus import GPU

aten = torch.ops.aten


@contextlib.contextmanager
def cuda_rules(gpu: GPU, note: Callable[[str], None]) -> Iterator[None]:
    """Inside, PyTorch's dispatcher chooses as it does on a GPU.

    Args:
        gpu: the GPU.
        note: called with a sentence for each thing that has to be assumed.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        for key in ("AutogradCUDA", "CUDA"):
            library.impl("scaled_dot_product_attention", _attention, key)
        yield
    finally:
        library._destroy()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention by the kernel that CUDA would choose: (batch, heads, length,
    width) each.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and query.shape[-1] <= 256:
        kernel = aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(groups, -3)
        value = value.repeat_interleave(groups, -3)
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            numbers = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = numbers.masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, trained, dropout_p, is_causal, scale=scale)[0]


def _softmax(numbers: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """On CUDA the result is FP32 without an FP32 copy of the input (SoftMax.cu: half_to_float, for
    FP16 and BF16). PyTorch's fake kernel knows it for FP16 only.
    """
    return torch.empty_like(numbers, dtype=torch.float32 if half_to_float else numbers.dtype)


#: Operators whose fake kernel does not do, and what stands in for it.
KERNELS = {aten._log_softmax.default: _softmax, aten._softmax.default: _softmax}
