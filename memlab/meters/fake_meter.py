"""A GPU that is not there: its bytes, from a run on fake tensors and the allocator simulated.

It has the form of the other meters (`start`, `stop` -> `Readings`), and a run on it needs no
device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.utils._foreach_utils

from memlab.ledger import Event, Observation
from memlab.meters import cpu, live
from memlab.meters.allocator import Allocator
from memlab.meters.cuda_rules import cuda_rules
from memlab.meters.cuda_stand_in import accelerator_stand_in
from memlab.meters.fake import FakeMode, Shapes
from memlab.meters.fake_kernels import KERNELS
from memlab.meters.fake_patches import (
    compiled_as_eager,
    fake_addresses,
    fake_tensors_taken,
    random_states_seen,
    values_made_up,
)
from memlab.meters.fake_ranks import whole_shapes_set_aside
from memlab.meters.fake_storages import Made
from memlab.meters.gpus import GPU
from memlab.meters.kernel_scratch import scratch_of
from memlab.meters.readings import Readings
from memlab.meters.torch_cuda import torch_cuda_stand_in

# The allocator hands out multiples of this.
_GRAIN = 512

# The first of these in a thread takes a cuBLAS workspace, and keeps it (CublasHandlePool.cpp).
# Forward has a thread, and backward has one.
_PRODUCTS = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot")
)


class Meter:
    """Notes what a run on fake tensors would allocate, between `start()` and `stop()`.

    Args:
        device: the fake device that is metered: `cuda:0` or the CPU.
        gpu: the GPU that is predicted; None when the CPU is.
        note: called with a sentence for each thing that has to be assumed.
        allocator: the GPU's, with its settings.
    """

    def __init__(
        self,
        device: torch.device,
        gpu: GPU | None,
        note: Callable[[str], None],
        allocator: Allocator | None = None,
    ):
        self.device = device
        self.allocator = allocator or Allocator()
        self._gpu = gpu
        self._events: dict[str, list[Event]] = {"cuda": [], "cpu": []}
        #: What the allocator was asked for, as `Allocator.replay` takes it; workspaces have
        #: negative addresses.
        self.requests: list[tuple[str, int, int, int]] = []
        self._places: dict[int, int] = {}
        self._seen: list[Observation] = []
        self._with_workspace: set[str] = set()
        self._peak = self._workspaces_at_peak = 0
        # What `torch.cuda` tells the run, which may set them back.
        self._told_allocated = self._told_reserved = 0
        before = dict.fromkeys(_PRODUCTS, self._take_workspace) if gpu is not None else {}
        self._kernels: dict[object, Callable] = dict(KERNELS)
        # What operators take for themselves on the CPU is measured, and not predicted.
        on_gpu = {"scratch": functools.partial(scratch_of, gpu=gpu)} if gpu is not None else {}
        self.shapes = Shapes(note, self._on_event, self._kernels, before, **on_gpu)
        self._note = note
        self._stack = contextlib.ExitStack()
        # For the operators' and backward's spans only.
        self._profiler = cpu.Meter(torch.device("cpu"), memory=False)

    def start(self) -> None:
        """Switch the fake device on.

        Raises:
            RuntimeError: PyTorch's profiler is running, or this build has not what is needed.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(fake_addresses(self.shapes.storages))
            if self._gpu is not None:
                stack.enter_context(accelerator_stand_in())
                stack.enter_context(torch_cuda_stand_in(self._gpu, self._memory))
                kernels = stack.enter_context(cuda_rules(self._gpu, self._note))
                self._kernels.update(kernels)
            # Or the engine would hand a fake GPU's part to a thread that it does not have.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(fake_tensors_taken())
            stack.enter_context(random_states_seen(self.shapes.storages.see))
            stack.enter_context(compiled_as_eager(self._note))
            stack.enter_context(values_made_up(self._note))
            stack.enter_context(whole_shapes_set_aside(self.shapes))
            self._profiler.start()
            stack.enter_context(FakeMode())
            stack.enter_context(self.shapes)
            self._stack = stack.pop_all()

    def stop(self) -> Readings:
        """Switch it off again, and say what it allocated."""
        self.shapes.storages.settle()
        try:
            spans = self._profiler.stop().spans
        finally:
            self._stack.close()
        readings = Readings(self._events[self.device.type], spans, observations=self._seen)
        if self._gpu is None:
            return readings
        return dataclasses.replace(
            readings,
            # The allocator counts whole blocks: one that is up to 1 MiB too large is not split.
            peak_allocated=self._peak - self._workspaces_at_peak,
            reserved_bytes=self.allocator.peak_reserved_bytes,
            workspace_bytes=self._workspace_bytes,
        )

    @property
    def host_events(self) -> list[Event]:
        """What the run allocated on the host."""
        return self._events["cpu"]

    def _on_event(self, device: str, made: Made) -> None:
        events = self._events.get(device)
        if events is None:
            return
        size = made.size
        if device == "cuda" and self._gpu is not None:
            rounded = -(-abs(size) // _GRAIN) * _GRAIN
            size = rounded if size > 0 else -rounded
            if size > 0:
                self._places[made.address] = self.allocator.allocate(made.size)
                self.requests.append(("alloc", made.address, made.size, 0))
                self._told_allocated = max(self._told_allocated, self.allocator.allocated_bytes)
                self._told_reserved = max(self._told_reserved, self.allocator.reserved_bytes)
                if self.allocator.allocated_bytes > self._peak:
                    self._peak = self.allocator.allocated_bytes
                    self._workspaces_at_peak = self._workspace_bytes
            else:
                self.allocator.free(self._places.pop(made.address))
                self.requests.append(("free", made.address, 0, 0))
        events.append(Event(made.time, made.address, size))
        if size > 0 and device == self.device.type:
            seen = Observation(made.time, made.address, "", "", made.dtype, made.shape)
            self._seen.append(seen)

    @property
    def _workspace_bytes(self) -> int:
        return self._gpu.workspace_bytes * len(self._with_workspace)

    def _take_workspace(self) -> None:
        # The engine has one thread here, so it has to be asked whether a backward runs.
        thread = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        if thread not in self._with_workspace:
            self._with_workspace.add(thread)
            self.allocator.allocate(self._gpu.workspace_bytes)
            address = -len(self._with_workspace)
            self.requests.append(("alloc", address, self._gpu.workspace_bytes, 0))

    def _memory(self) -> SimpleNamespace:
        allocator = self.allocator
        return SimpleNamespace(
            allocated=allocator.allocated_bytes,
            reserved=allocator.reserved_bytes,
            peak_allocated=self._told_allocated,
            peak_reserved=self._told_reserved,
            empty_cache=self._empty_cache,
            reset_peak=self._reset_told,
        )

    def _empty_cache(self) -> None:
        self.allocator.empty_cache()
        self.requests.append(("segment_unmap", 0, 0, 0))

    def _reset_told(self) -> None:
        self._told_allocated = self.allocator.allocated_bytes
        self._told_reserved = self.allocator.reserved_bytes
