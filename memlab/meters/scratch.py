"""A buffer that a CUDA kernel takes for itself, and what of the GPU decides how large it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from memlab.meters.gpus import GPU

HALVES = (torch.float16, torch.bfloat16)

# Threads that a multiprocessor holds at once (deviceQuery's "Maximum number of threads per
# multiprocessor"): 2,048, and fewer on Turing (7.5) and on the gaming cards since.
_THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536, (12, 1): 1536}


class Scratch(NamedTuple):
    """A buffer that a kernel takes.

    `until` is the number of the buffer before which it is given back; None: at the operator's end.
    """

    size: int
    until: int | None = None


def lives_of(buffers: Sequence[Scratch]) -> Iterator[tuple[int, bool]]:
    """The number of each buffer, in the order of events: True when it is taken, False when it is
    given back.
    """
    for number in range(len(buffers)):
        yield from ((n, False) for n in range(number) if buffers[n].until == number)
        yield number, True
    yield from ((n, False) for n, buffer in enumerate(buffers) if buffer.until is None)


class Processors(NamedTuple):
    """A GPU's multiprocessors, and the threads that each of them can hold."""

    count: int
    threads: int


def architecture_of(gpu: GPU) -> tuple[int, int]:
    """The GPU's compute capability; an H100's where it is not known."""
    return gpu.architecture or (9, 0)


def processors_of(gpu: GPU) -> Processors:
    """The GPU's multiprocessors; an H100's where they are not known."""
    return Processors(gpu.multiprocessors or 132, _THREADS.get(architecture_of(gpu), 2048))
