"""What CUDA's kernels take for themselves during one operator, and give back at its end.

No tensor of the program is behind these bytes, so a run on shapes does not see them. Each rule is
PyTorch's own, read from its source; where a kernel's library decides (cuDNN), `cuda_rules` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, prod

import torch

from memlab.meters.attention_scratch import cudnn_backward, efficient_backward, flash_backward
from memlab.meters.cuda_reduction import staging_bytes
from memlab.meters.gpus import GPU
from memlab.meters.scratch import HALVES, Scratch, processors_of

aten = torch.ops.aten


def scratch_of(
    operator: object, arguments: Sequence, keywords: dict, result: object, gpu: GPU
) -> Sequence[Scratch]:
    """Return what a CUDA kernel takes for itself, in the order in which it is taken.

    Args:
        operator: an operator of `torch.ops.aten`, with its overload.
        arguments: of the call.
        keywords: of the call.
        result: of the call.
        gpu: the GPU. Where it is only a size, an H100 is taken.

    Returns:
        The buffers, beside the result; empty for most operators.
    """
    rule = _RULES.get(operator)
    return rule(arguments, keywords, result, gpu) if rule is not None else ()


# Sums and other reductions


def _sum(arguments: Sequence, keywords: dict, result: torch.Tensor, gpu: GPU) -> list[Scratch]:
    """The kernels whose result may have another dtype than the input: sum, mean, product."""
    tensor, dtype = arguments[0], result.dtype
    buffers = []
    if dtype is not tensor.dtype and not (tensor.dtype in HALVES and dtype is torch.float32):
        # make_reduction() in ReduceOpsUtils.h: the input is converted first, unless it has 16 bits
        # and the result 32.
        buffers.append(Scratch(tensor.numel() * dtype.itemsize))
    partial = 4 if dtype in HALVES else dtype.itemsize  # 16 bits are added up in FP32 (acc_type)
    return buffers + _staging(arguments, keywords, partial, gpu, first=len(buffers))


def _reduction(accumulator: Callable[[torch.dtype], int], values_at_once: int = 4) -> Callable:
    """The rule of a reduction, whose partial results have `accumulator(dtype)` bytes."""

    def rule(arguments: Sequence, keywords: dict, result: object, gpu: GPU) -> list[Scratch]:
        partial = accumulator(arguments[0].dtype)
        return _staging(arguments, keywords, partial, gpu, values_at_once=values_at_once)

    return rule


def _staging(
    arguments: Sequence,
    keywords: dict,
    partial_bytes: int,
    gpu: GPU,
    *,
    first: int = 0,
    values_at_once: int = 4,
) -> list[Scratch]:
    """The staging buffers of a reduction; the first one is the operator's buffer `first`."""
    tensor = arguments[0]
    axes = arguments[1] if len(arguments) > 1 else keywords.get("dim")
    if isinstance(axes, int) and not isinstance(axes, bool):
        axes = [axes]
    if not isinstance(axes, (list, tuple)) or not axes:
        axes = range(tensor.dim())
    launches = staging_bytes(
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.storage_offset(),
        frozenset(axis % tensor.dim() for axis in axes if tensor.dim()),
        tensor.element_size(),
        partial_bytes,
        processors_of(gpu),
        values_at_once,
    )
    buffers = []
    for number, (staging, semaphores) in enumerate(launches):
        following = first + 2 * (number + 1)
        until = following if number < len(launches) - 1 else None
        buffers += [Scratch(staging, until), Scratch(semaphores, until)]
    return buffers


def _mean_and_count(dtype: torch.dtype) -> int:
    """`WelfordData` (SharedReduceOps.h): mean, square, a 32-bit count, and the count as a float."""
    return 32 if dtype is torch.float64 else 16


def _value_and_place(dtype: torch.dtype) -> int:
    """A value, and its 64-bit place, on 8 bytes."""
    return 16


# Embeddings and norms


def _embedding_backward(
    arguments: Sequence, keywords: dict, result: object, gpu: GPU
) -> list[Scratch]:
    """`embedding_dense_backward` (cuda/Embedding.cu, cuda/EmbeddingBackwardKernel.cu)."""
    gradient, indices, vocabulary = arguments[:3]
    by_frequency = arguments[4]
    tokens = indices.numel()
    width = gradient.shape[-1]
    buffers = []
    if not gradient.is_contiguous():
        buffers.append(Scratch(gradient.numel() * gradient.element_size()))
    if tokens <= 3072 and not by_frequency:
        return buffers
    # sorted_indices and orig_indices live to the end. (What the sort itself takes is CUB's, and
    # smaller than what follows.)
    buffers += [Scratch(8 * tokens)] * 2
    if by_frequency:
        buffers.append(Scratch(8 * tokens))
    segments = min(tokens, vocabulary)
    partial = tokens // 10 + segments  # NROWS_PER_THREAD
    buffers += [Scratch(8 * tokens), Scratch(8), Scratch(8)]  # segment_offsets, two counters
    buffers += [Scratch(8 * segments)] * 2
    buffers.append(Scratch(8 * partial))
    buffers.append(Scratch(4 * partial * width))  # grad_weight_per_segment, FP32
    return buffers


def _layer_norm_backward(
    arguments: Sequence, keywords: dict, result: object, gpu: GPU
) -> list[Scratch]:
    """`LaunchGammaBetaBackwardCUDAKernel` (cuda/layer_norm_kernel.cu, since 2.8): partial sums only
    where the rows are many and the columns too few for all multiprocessors.
    """
    gradient, tensor, normalized = arguments[:3]
    columns = prod(normalized)
    rows = tensor.numel() // max(columns, 1)
    if rows <= 65_536 or columns / 32 >= processors_of(gpu).count / 2:
        return []
    blocks = min(32_768 // ceil(columns / 32), ceil(rows / 32))
    size = blocks * columns * tensor.element_size()
    return [Scratch(size) for gradient in result[1:] if gradient is not None]


def _group_norm_backward(
    arguments: Sequence, keywords: dict, result: object, gpu: GPU
) -> list[Scratch]:
    """`GroupNormBackwardKernelImplInternal` (cuda/group_norm_kernel.cu)."""
    tensor, weight = arguments[1], arguments[4]
    batch, channels, pixels, groups = arguments[5:9]
    item = 8 if tensor.dtype is torch.float64 else 4
    if pixels == 1:
        return []
    buffers = [Scratch(item * batch * channels)] * 2  # ds, db
    if arguments[9][0]:  # for the input's gradient
        buffers += [Scratch(item * batch * groups)] * 2  # c2, c3
        if weight is not None:
            buffers.append(Scratch(item * batch * channels))  # c1
    return buffers


def _foreach_norm(arguments: Sequence, keywords: dict, result: object, gpu: GPU) -> list[Scratch]:
    """`output_per_tensor` in cuda/ForeachReduceOp.cu: one number for each 65,536 elements of the
    largest tensor, for every tensor.
    """
    tensors = arguments[0]
    if not tensors:
        return []
    chunks = ceil(max(tensor.numel() for tensor in tensors) / 65_536)
    return [Scratch(len(tensors) * chunks * max(4, tensors[0].element_size()))]


def _index_put(arguments: Sequence, keywords: dict, result: object, gpu: GPU) -> list[Scratch]:
    """`index_put_with_sort_kernel` (cuda/Indexing.cu): only what adds up is sorted."""
    accumulate = arguments[3] if len(arguments) > 3 else keywords.get("accumulate", False)
    indices = [index for index in arguments[1] if index is not None]
    if not accumulate or not indices:
        return []
    count = prod(torch.broadcast_shapes(*(index.shape for index in indices)))
    buffers = [Scratch(8 * count)] * 3  # linearIndex, sorted_indices, orig_indices
    if not arguments[2].is_contiguous():
        buffers.append(Scratch(arguments[2].numel() * arguments[2].element_size()))
    return buffers


_VALUE = _reduction(lambda dtype: dtype.itemsize)
_WELFORD = _reduction(_mean_and_count, values_at_once=2)
_PLACE = _reduction(_value_and_place)

_RULES: dict[object, Callable] = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _sum,
    aten.mean.dim: _sum,
    aten.prod.default: _sum,
    aten.amax.default: _VALUE,
    aten.amin.default: _VALUE,
    aten.max.default: _VALUE,
    aten.min.default: _VALUE,
    aten.var.correction: _WELFORD,
    aten.std.correction: _WELFORD,
    aten.var_mean.correction: _WELFORD,
    aten.argmax.default: _PLACE,
    aten.argmin.default: _PLACE,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    aten._scaled_dot_product_cudnn_attention_backward.default: cudnn_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten.index_put.default: _index_put,
    aten.index_put_.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten._index_put_impl_.default: _index_put,
}
