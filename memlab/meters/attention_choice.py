"""Which kernel `scaled_dot_product_attention` takes on a CUDA GPU.

The tests are those of `sdp_utils.cpp` (aten/src/ATen/native/transformers/cuda) and of
`sdp_utils_cpp.h`, which is shipped with PyTorch: the first kernel all of whose tests pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from memlab.meters.scratch import HALVES

#: cuDNN's version as PyTorch counts it, where nothing else is said: torch 2.11 for CUDA 13.0, with
#: which the H100 was measured, requires 9.19.0 (its wheel's metadata).
CUDNN_VERSION = 91900

# Since this version cuDNN comes before flash on Hopper and Blackwell's data center GPUs
# (check_prefer_cudnn_attention; the wheels for CUDA 12 come with an older one).
_CUDNN_PREFERRED_ABOVE = 91500
_CUDNN_WIDE_SINCE = 91000
_CUDNN_NO_DROPOUT = range(91101, 91400)


class Call(NamedTuple):
    """One call of `scaled_dot_product_attention`, as far as the choice depends on it.

    Attributes:
        query: (batch, heads, queries, width).
        key: (batch, key heads, keys, width).
        value: (batch, key heads, keys, value width).
        mask: as it was given, or None.
        dropout: a probability.
        causal: whether `is_causal` was said.
        grouped: whether `enable_gqa` was said.
        gradients: whether a gradient is needed.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    causal: bool
    grouped: bool
    gradients: bool


def choose_kernel(call: Call, architecture: tuple[int, int], cudnn_version: int) -> str:
    """Return "cudnn", "flash", "efficient" or "math".

    Args:
        call: the call.
        architecture: the GPU's compute capability.
        cudnn_version: as `torch.backends.cudnn.version()` would say it; 0 where cuDNN is missing.

    Raises:
        RuntimeError: what could run is switched off (`torch.nn.attention.sdpa_kernel`).
    """
    cuda = torch.backends.cuda
    tests = {
        "flash": lambda: cuda.flash_sdp_enabled() and _flash_can(call, architecture),
        "efficient": lambda: (
            cuda.mem_efficient_sdp_enabled() and _efficient_can(call, architecture)
        ),
        "math": cuda.math_sdp_enabled,
    }
    # Last in PyTorch's own order, first where it is preferred.
    use_cudnn = cuda.cudnn_sdp_enabled() and _cudnn_can(call, architecture, cudnn_version)
    data_center = architecture[0] in (9, 10) and architecture[1] in (0, 3)
    if use_cudnn and data_center and cudnn_version > _CUDNN_PREFERRED_ABOVE:
        return "cudnn"
    for kernel, can in tests.items():
        if can():
            return kernel
    if use_cudnn:
        return "cudnn"
    raise RuntimeError(
        "no kernel of scaled_dot_product_attention can run this call on the GPU: those that could"
        " are switched off. Let torch.nn.attention.sdpa_kernel allow SDPBackend.MATH as well"
    )


def _shapes_fit(call: Call, *, grouped: bool, singletons: bool = True) -> bool:
    """The tests that all three have in common (`check_tensor_shapes` and the dense ones).

    Args:
        call: the call.
        grouped: whether the kernel knows fewer heads of keys than of queries.
        singletons: whether a last axis of one element may have any stride.
    """
    tensors = (call.query, call.key, call.value)
    if any(tensor.dim() != 4 for tensor in tensors):
        return False
    if not call.query.shape[2] or not call.key.shape[2]:
        return False
    if len({tensor.shape[0] for tensor in tensors}) > 1:
        return False
    strides_fit = all(tensor.stride(-1) == 1 for tensor in tensors)
    if not strides_fit and not (singletons and call.query.shape[-1] == 1):
        return False
    if call.mask is not None and call.mask.stride(-1) != 1:
        return False
    heads, key_heads, value_heads = (tensor.shape[1] for tensor in tensors)
    if grouped and call.grouped:
        return key_heads == value_heads and heads % key_heads == 0
    return heads == key_heads == value_heads


def _flash_can(call: Call, architecture: tuple[int, int]) -> bool:
    width = call.query.shape[-1]
    if call.mask is not None or not (8, 0) <= architecture <= (12, 1):
        return False
    if call.query.dtype not in HALVES or not _shapes_fit(call, grouped=True):
        return False
    if width > 256 or not width == call.key.shape[-1] == call.value.shape[-1]:
        return False
    if call.causal and call.query.shape[2] != call.key.shape[2]:
        return False
    # check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120
    small = (8, 6) <= architecture <= (8, 9) or (12, 0) <= architecture <= (12, 1)
    if call.gradients and small:
        return width <= 192 or (width > 224 and not call.dropout)
    return True


def _efficient_can(call: Call, architecture: tuple[int, int]) -> bool:
    dtype = call.query.dtype
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if dtype not in (dtypes if architecture >= (8, 0) else dtypes[:2]):
        return False
    # Groups of heads: not up to 2.13 (supports_gqa is false there).
    if not _shapes_fit(call, grouped=False, singletons=False):
        return False
    # minimum_gemm_alignment(): 16 bytes with tensor cores
    alignment = 4 if architecture >= (8, 0) else 1
    if dtype in HALVES and architecture >= (7, 0):
        alignment = 8
    width, key_width, value_width = (
        tensor.shape[-1] for tensor in (call.query, call.key, call.value)
    )
    return width == key_width and not width % alignment and not value_width % alignment


def _cudnn_can(call: Call, architecture: tuple[int, int], version: int) -> bool:
    if version < 90000 or not (8, 0) <= architecture <= (12, 1):
        return False
    if call.query.dtype not in HALVES or not _shapes_fit(call, grouped=True):
        return False
    if torch.are_deterministic_algorithms_enabled() and (
        not torch.is_deterministic_algorithms_warn_only_enabled()
    ):
        return False
    if call.dropout and (version in _CUDNN_NO_DROPOUT or call.query.shape[2] == 1):
        return False
    if call.key.shape[2] == 1 or not _cudnn_mask_fits(call):
        return False
    widest = 256 if architecture == (9, 0) and version >= _CUDNN_WIDE_SINCE else 128
    widths = (call.query.shape[-1], call.value.shape[-1])
    return all(width <= widest and not width % 8 for width in widths)


def _cudnn_mask_fits(call: Call) -> bool:
    """`check_attn_mask_shape`: two or four axes, and no gradient for the mask."""
    mask = call.mask
    if mask is None:
        return True
    if mask.requires_grad or mask.dim() not in (2, 4):
        return False
    full = (*call.query.shape[:2], call.query.shape[2], call.key.shape[2])[-mask.dim() :]
    return all(size in (1, whole) for size, whole in zip(mask.shape, full, strict=True))
