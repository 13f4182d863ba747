"""CUDA's caching allocator, simulated: how many bytes PyTorch would reserve for a run's
allocations. The standard library is enough, so it also runs where there is no GPU and no torch.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp`, and each stands where it is applied,
under the name it has there. What was read: that file as of late 2025, the headers of torch 2.13,
and the disassembled `libc10_cuda.so` of the wheels of torch 2.11, 2.12 and 2.13, where the three
differ (`Ties`).

What is not simulated: private pools (CUDA graphs, `torch.cuda.MemPool`), more than one device, the
backend `cudaMallocAsync`, and time (see `Allocator.free`).
"""

from memlab.meters.allocator.allocator import Allocator
from memlab.meters.allocator.blocks import Ties
from memlab.meters.allocator.out_of_memory import OutOfMemory
from memlab.meters.allocator.settings import Settings
from memlab.meters.allocator.snapshot import BlockInfo, SegmentInfo

__all__ = ["Allocator", "BlockInfo", "OutOfMemory", "SegmentInfo", "Settings", "Ties"]
