"""What CUDA's reductions (`sum`, `mean`, `var`, `norm`) take as a staging buffer.

A sum over many rows is split over thread blocks. Each block writes its share into a buffer, and the
last one adds the shares up. Both live during the call alone. The rules are those of
`aten/src/ATen/native/cuda/Reduce.cuh`, which is shipped with PyTorch: `setReduceConfig`,
`ReduceConfig::global_memory_size` and `gpu_reduce_kernel` (read in torch 2.13).
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

from memlab.meters.scratch import Processors

_THREADS = 512  # mnt_wrapper::MAX_NUM_THREADS
_WARP = 32
_VALUES_LEAST, _VALUES_MOST = 16, 256  # min_values_per_thread, max_values_per_thread
_INT32 = 2**31 - 1


class _Axes(NamedTuple):
    """The input's axes in `TensorIterator`'s order: the reduced ones first, small strides first.

    Neighbours that are one piece in memory are merged. Strides are in elements.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    reduced: int  # so many of them are reduced
    offset: int


@lru_cache(maxsize=10_000)
def staging_bytes(
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
    reduced: frozenset[int],
    item_bytes: int,
    accumulator_bytes: int,
    processors: Processors,
    values_at_once: int = 4,
) -> tuple[tuple[int, int], ...]:
    """Return the bytes of each staging buffer and its semaphores that a reduction takes.

    Args:
        sizes: of the input.
        strides: of the input, in elements.
        offset: where the input begins in its storage, in elements.
        reduced: the axes that are reduced.
        item_bytes: of an input element.
        accumulator_bytes: what one partial result takes: 4 for sums of FP32, FP16 and BF16.
        processors: of the GPU.
        values_at_once: how many values a thread loads at once (`vt0` in the source).

    Returns:
        A pair for each time that the kernel runs: more than once only where the input is larger
        than 32-bit indices reach. Empty if no buffer is taken.
    """
    if not prod(sizes):
        return ()
    axes = _axes(sizes, strides, offset, reduced)
    buffers = []
    for piece in _pieces(axes, item_bytes):
        found = _one_launch(piece, accumulator_bytes, processors, values_at_once)
        if found is not None:
            buffers.append(found)
    return tuple(buffers)


def _axes(
    sizes: tuple[int, ...], strides: tuple[int, ...], offset: int, reduced: frozenset[int]
) -> _Axes:
    """Order and merge the axes (`TensorIteratorBase::reorder_dimensions`, `coalesce_dimensions`).

    The result is contiguous, so the kept axes stand in its order, the last one first.
    """
    kinds = [axis for axis in range(len(sizes)) if sizes[axis] != 1]
    summed = sorted((a for a in kinds if a in reduced), key=lambda a: (strides[a], -a))
    kept = [a for a in reversed(kinds) if a not in reduced]
    merged: list[list[int]] = []
    number = 0
    for group in (summed, kept):
        start = len(merged)
        for axis in group:
            last = merged[-1] if len(merged) > start else None
            if last is not None and last[0] * last[1] == strides[axis]:
                last[0] *= sizes[axis]
            else:
                merged.append([sizes[axis], strides[axis]])
        if group is summed:
            number = len(merged)
    return _Axes(
        tuple(size for size, _ in merged), tuple(stride for _, stride in merged), number, offset
    )


def _pieces(axes: _Axes, item_bytes: int) -> list[_Axes]:
    """Halve the longest axis until 32-bit indices reach all of it (`with_32bit_indexing`)."""
    reach = [(size - 1) * stride for size, stride in zip(axes.sizes, axes.strides, strict=True)]
    if prod(axes.sizes) <= _INT32 and 1 + sum(reach) * item_bytes <= _INT32:
        return [axes]
    longest = max(range(len(reach)), key=lambda axis: reach[axis])
    size = axes.sizes[longest]
    first = size // 2
    pieces = []
    for part, start in ((first, 0), (size - first, first)):
        sizes = axes.sizes[:longest] + (part,) + axes.sizes[longest + 1 :]
        offset = axes.offset + start * axes.strides[longest]
        pieces += _pieces(axes._replace(sizes=sizes, offset=offset), item_bytes)
    return pieces


def _one_launch(
    axes: _Axes, accumulator_bytes: int, processors: Processors, values_at_once: int
) -> tuple[int, int] | None:
    """The buffer and the semaphores of one launch; None if the sum is not split over blocks."""
    inputs = prod(axes.sizes[: axes.reduced])
    outputs = prod(axes.sizes[axes.reduced :])
    along_rows, vector, first, second = _directions(axes, inputs, outputs, values_at_once)
    width, height = _block(first, second, _THREADS // vector)

    step_in = width if along_rows else 1
    step_out = 1 if along_rows else width
    over_warps = _up(inputs, step_in) >= min(height * _VALUES_LEAST, _VALUES_MOST)
    if over_warps:
        step_in *= height
    else:
        step_out *= height

    values = _up(inputs, step_in)  # that each thread adds up
    grid = _up(outputs // vector, step_out)
    wished = processors.count * (processors.threads // (width * height))
    if not over_warps or values < _VALUES_MOST or grid > wished:
        return None
    blocks = min(_up(wished, grid), _up(values, _VALUES_LEAST))
    blocks = max(blocks, _up(values, _VALUES_MOST))
    if blocks <= 1:
        return None
    buffer = accumulator_bytes * outputs * blocks
    if not along_rows:
        # PyTorch takes this many times more than the partial results need: it multiplies by the
        # block's width although the outputs were not divided by it.
        buffer *= width * vector
    return buffer, 4 * grid


def _directions(
    axes: _Axes, inputs: int, outputs: int, values_at_once: int
) -> tuple[bool, int, int, int]:
    """Whether threads lie along the reduced axis, outputs at once, and the block's two extents."""
    if not axes.sizes:
        return True, 1, 1, 1
    all_reduced = axes.reduced == len(axes.sizes)
    if all_reduced or axes.strides[0] < axes.strides[axes.reduced]:
        first = inputs
        if axes.strides[0] == 1 and first >= 128 and axes.reduced == 1:
            first //= values_at_once
        return True, 1, first, outputs
    vector = 1
    if axes.strides[axes.reduced] == 1:
        # get_output_vec_size(): what the begin, the kept size and the other strides divide by
        others = [stride for axis, stride in enumerate(axes.strides) if axis != axes.reduced]
        vector = 4
        for number in (axes.offset, axes.sizes[axes.reduced], *others):
            while number % vector:
                vector //= 2
    return False, vector, outputs // vector, inputs


def _block(first: int, second: int, most: int) -> tuple[int, int]:
    """A block's width and height (`set_block_dimension`)."""
    first = _power_of_two(min(first, most))
    second = _power_of_two(min(second, most))
    width = min(first, _WARP)
    height = min(second, most // width)
    return min(first, most // height), height


def _power_of_two(number: int) -> int:
    """The largest power of two up to a number."""
    return 1 << max(number, 1).bit_length() - 1


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor)
