"""`scaled_dot_product_attention` as CUDA computes it: the kernel, and what is copied around it.

What is done before and after a kernel is that of `aten/src/ATen/native/transformers/attention.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from memlab.meters.attention_choice import Call, choose_kernel
from memlab.meters.gpus import GPU
from memlab.meters.scratch import architecture_of

aten = torch.ops.aten

_NOTES = {
    "cudnn": "attention: cuDNN's kernel, as PyTorch chooses with cuDNN {version}. What cuDNN takes"
    " for itself in backward is assumed: the query's gradient in FP32",
    "flash": "attention: the flash kernel",
    "efficient": "attention: the memory-efficient kernel",
    "math": "attention: PyTorch's formula (math), which keeps the scores. No fused kernel takes"
    " this call on {gpu}",
}


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    gpu: GPU,
    cudnn_version: int,
    note: Callable[[str], None],
) -> torch.Tensor:
    """Attention by the kernel that the GPU's PyTorch would choose.

    Args:
        query: (batch, heads, queries, width); and so on, as PyTorch's function.
        gpu: the GPU.
        cudnn_version: as `torch.backends.cudnn.version()` would say it.
        note: called with the kernel that was chosen.
    """
    tensors = (query, key, value)
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    call = Call(*tensors, attn_mask, dropout_p, is_causal, enable_gqa, gradients)
    kernel = choose_kernel(call, architecture_of(gpu), cudnn_version)
    version = f"{cudnn_version // 10_000}.{cudnn_version // 100 % 100}"
    note(_NOTES[kernel].format(version=version, gpu=gpu.name))
    return _KERNELS[kernel](call, scale)


def _cudnn(call: Call, scale: float | None) -> torch.Tensor:
    mask = _as_numbers(call.mask, call.query.dtype)
    return aten._scaled_dot_product_cudnn_attention(
        *call[:3], mask, call.gradients, call.dropout, call.causal, False, scale=scale
    )[0]


def _flash(call: Call, scale: float | None) -> torch.Tensor:
    """With the width filled up to a multiple of 8 (`pad_last_dim<8>` in attention.cpp)."""
    width = call.query.shape[-1]
    tensors = call[:3]
    if width % 8:
        tensors = [pad(tensor, (0, 8 - width % 8)) for tensor in tensors]
        scale = scale if scale is not None else width**-0.5
    out = aten._scaled_dot_product_flash_attention(
        *tensors, call.dropout, call.causal, False, scale=scale
    )[0]
    return out[..., :width] if width % 8 else out


def _efficient(call: Call, scale: float | None) -> torch.Tensor:
    """With the mask's rows filled up to a multiple of 16 (`pad_bias`, `preprocess_mask`)."""
    mask = _as_numbers(call.mask, call.query.dtype)
    if mask is not None:
        keys = mask.shape[-1]
        if keys % 16:
            mask = pad(mask, (0, 16 - keys % 16))[..., :keys]
        mask = mask.expand(*call.query.shape[:3], call.key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        *call[:3], mask, call.gradients, call.dropout, call.causal, scale=scale
    )[0]


def _math(call: Call, scale: float | None) -> torch.Tensor:
    return aten._scaled_dot_product_attention_math(
        *call[:4], call.dropout, call.causal, None, scale=scale, enable_gqa=call.grouped
    )[0]


def _as_numbers(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as numbers to add (`convert_boolean_attn_mask` in attention.cpp)."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    zero = torch.scalar_tensor(0.0, dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.full_like(zero, float("-inf")))


_KERNELS = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient, "math": _math}
