"""What the backward passes of CUDA's attention kernels take for themselves."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch

from memlab.meters.gpus import GPU
from memlab.meters.scratch import HALVES, Scratch, architecture_of, processors_of

# Whose blocks may have more than 160 KiB of shared memory (CUDA programming guide, technical
# specifications per compute capability). The others have 64 to 99 KiB.
_LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))


def efficient_backward(
    arguments: Sequence, keywords: dict, result: object, gpu: GPU
) -> list[Scratch]:
    """`_efficient_attention_backward` (transformers/cuda/attention_backward.cu)."""
    gradient, query, key, value = arguments[:4]
    batch, heads, rows, width = query.shape
    columns = key.shape[2]
    widest = max(width, value.shape[3])
    buffers = []
    if not gradient.transpose(1, 2).is_contiguous():
        buffers.append(Scratch(gradient.numel() * gradient.element_size()))
    delta = 4 * batch * heads * rows
    if query.dtype not in HALVES:
        # (grad_out.to(kFloat) * out.to(kFloat)).sum(-1).transpose(-2, -1).contiguous()
        after = len(buffers) + 3
        product = 4 * batch * heads * rows * value.shape[3]
        buffers += [Scratch(product, after), Scratch(delta, after)]
    buffers.append(Scratch(delta))
    tile, keys, in_registers = _efficient_tile(query.dtype, widest, architecture_of(gpu))
    workspace = 0
    if architecture_of(gpu) >= (7, 0) or query.dtype in HALVES:
        tiles = ceil(rows / tile) * ceil(width / keys)
        workspace += tiles * (16 + 4 * tile * keys) // 4
    if query.dtype in HALVES and not in_registers:
        # workspace_elements_gk() and _gv() in kernel_backward.h. SDPA gives no number of splits, so
        # there is one for each tile of keys; one if the user asked for determinism.
        splits = ceil(columns / keys) if architecture_of(gpu) >= (7, 0) else 1
        if torch.are_deterministic_algorithms_enabled():
            splits = 1
        for size in (width, value.shape[3]):
            workspace += splits * keys * ceil(size / tile) * tile
    buffers.append(Scratch(4 * batch * heads * ceil(workspace / 4) * 4))
    return [buffer for buffer in buffers if buffer.size]


def _efficient_tile(
    dtype: torch.dtype, widest: int, architecture: tuple[int, int]
) -> tuple[int, int, bool]:
    """The rows of queries and of keys that a block takes, and whether the gradients of keys and
    values stay in its registers (kernels/cutlassB.h: the first kernel that is wide enough and fits
    into the shared memory; `kOutputInRF` in kernel_backward.h, for 16 bits).
    """
    if widest <= 64:
        return 64, 64, True
    half = dtype in HALVES
    if half and widest <= 96 and architecture in ((8, 6), (8, 9)):
        return 128, 64, True
    if architecture not in _LARGE_SHARED_MEMORY:
        return 64, 64, False
    if half and widest <= 128:
        return 128, 128, True
    return 128, 64, False


def flash_backward(arguments: Sequence, keywords: dict, result: object, gpu: GPU) -> list[Scratch]:
    """`mha_bwd` in transformers/cuda/flash_attn/flash_api.cpp."""
    query, key, value = arguments[1:4]
    batch, heads, rows, width = query.shape
    rows = ceil(rows / 128) * 128
    rounding = 32 if width <= 128 else 64
    width = ceil(width / rounding) * rounding
    copies = 1
    if torch.are_deterministic_algorithms_enabled():
        copies = ceil(processors_of(gpu).count / (batch * heads))
    buffers = [
        Scratch(4 * batch * heads * rows),  # softmax_d
        Scratch(4 * copies * batch * rows * heads * width),  # dq_accum, FP32
    ]
    if key.shape[1] != heads:  # dk_expanded, dv_expanded: added up over each group of heads
        for tensor in (key, value):
            expanded = batch * heads * prod(tensor.shape[2:])
            buffers.append(Scratch(expanded * tensor.element_size()))
    return buffers


def cudnn_backward(arguments: Sequence, keywords: dict, result: object, gpu: GPU) -> list[Scratch]:
    """ASSUMED: cuDNN's workspace is its own secret. Taken is what the algorithm cannot do without:
    the query's gradient added up in FP32, and a sum for each row. `cuda_rules` notes it.
    """
    query = arguments[1]
    batch, heads, rows, width = query.shape
    return [Scratch(4 * batch * heads * rows), Scratch(4 * batch * heads * rows * width)]
