"""A CUDA device's bytes: the allocator's own counters for the peak, its recorded history for the
timeline.

Three numbers, never mixed up: *allocated* (what tensors hold), *reserved* (what the allocator holds
from the driver, free blocks included) and *device* (what the driver says is in use on the whole
device, CUDA's context included).

cuBLAS's workspaces are none of a run's bytes: PyTorch allocates one for each thread that multiplies
matrices (32 MiB on Hopper, 8.1 MiB before; backward runs in a thread of its own) and keeps it as
long as the process lives, whatever the model. They are told apart from the rest and reported by
themselves.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import time

import torch

from memlab.meters import cpu
from memlab.meters.counter import Held
from memlab.meters.cuda_history import read_alive, read_history, split_workspaces
from memlab.meters.live import live_storages
from memlab.meters.readings import Readings
from memlab.units import MiB

# More than a few hundred steps of a large model. Bounded, so that a forgotten recording cannot fill
# the host.
_MAX_ENTRIES = 2_000_000


__all__ = [
    "Limit",
    "Meter",
    "bytes_alive",
    "describe",
    "free_bytes",
    "has_own_memory",
    "properties",
    "resolve",
    "room_for",
    "synchronize",
]


def resolve(device: torch.device) -> torch.device:
    """The device with its index.

    Raises:
        ValueError: it is not there.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device is there (torch.cuda.is_available() is False). Use device='cpu'"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"cuda:{index} is not there: this machine has {torch.cuda.device_count()} CUDA"
            " device(s)"
        )
    return torch.device("cuda", index)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    torch.cuda.synchronize(device)


def bytes_alive(device: torch.device) -> int:
    """Bytes that the allocator holds from the driver, with nothing cached and no workspaces."""
    clear_workspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def free_bytes(device: torch.device) -> tuple[int, int]:
    """Free bytes and all bytes of the device, as the driver counts them."""
    return torch.cuda.mem_get_info(device)


def has_own_memory() -> bool:
    """A GPU has memory beside the host's."""
    return True


def properties(device: torch.device) -> dict[str, object]:
    """What it is: its name, its memory in bytes, and whether it computes with BF16 itself."""
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        # A T4 says yes to BF16 when it may emulate it.
        "native_bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def room_for(limit: int) -> int:
    """More than that: the allocator reserves in segments, and parts of them stay empty."""
    return limit + limit // 4 + 64 * MiB


def describe(device: torch.device) -> dict[str, object]:
    """What a number depends on, of a GPU: its name, its memory in bytes, the driver."""
    gpu = properties(device)
    return {"gpu": gpu["name"], "gpu_bytes": gpu["memory_bytes"], "driver": _driver()}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return answer.stdout.split("\n")[0].strip() or None
    return None


class Limit:
    """Lets the allocator hold at most so many bytes: the allocation that passes it raises.

    cuBLAS's workspaces are allowed on top.

    Args:
        device: a CUDA device.
        limit: bytes.
        passed: not called here. The allocator raises its own error.
    """

    #: What operators take for themselves goes through the allocator, too.
    sees_scratch = True

    def __init__(self, device: torch.device, limit: int, passed: object = None):
        self.device = device
        self.limit = limit

    def start(self) -> None:
        """Set the limit."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        self._fraction_before = torch.cuda.get_per_process_memory_fraction(self.device)
        allowed = self.limit + workspace_bytes(self.device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), self.device)

    def stop(self) -> None:
        """Set the limit that was there before."""
        torch.cuda.set_per_process_memory_fraction(self._fraction_before, self.device)

    def bytes_alive(self) -> int:
        """Bytes that count against the limit now."""
        return torch.cuda.memory_reserved(self.device)

    def held(self) -> list[Held]:
        """The storages that live tensors hold."""
        now = time.time_ns()
        return [
            Held(storage.nbytes(), address, now, with_grad=True)
            for address, storage in live_storages(self.device).items()
        ]


class Meter:
    """Records a CUDA device's allocator between `start()` and `stop()`."""

    def __init__(self, device: torch.device):
        self.device = device
        # For the operators' and backward's spans only.
        self._profiler = cpu.Meter(torch.device("cpu"), memory=False)

    def start(self) -> None:
        """Empty the cache, set the counters to zero and begin to record."""
        clear_workspaces()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._allocated_before = torch.cuda.memory_allocated(self.device)
        self._alive = read_alive(torch.cuda.memory_snapshot(), self.device.index)
        self._profiler.start()
        torch.cuda.memory._record_memory_history(enabled=None)  # forget what someone else recorded
        # Context None: addresses, sizes and times without stack traces, which would slow the run
        # down.
        torch.cuda.memory._record_memory_history("all", context=None, max_entries=_MAX_ENTRIES)

    def stop(self) -> Readings:
        """Stop recording, switch the history off again and read what was recorded."""
        # Read before the workspaces go: the allocator keeps what it reserved until asked, so this
        # is close to the highest.
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        time.sleep(0.002)  # what goes from now on goes at a time that nothing else went
        ended = time.time_ns() - 1_000_000
        clear_workspaces()
        torch.cuda.synchronize(self.device)
        peak_allocated = torch.cuda.max_memory_allocated(self.device)
        reserved = torch.cuda.max_memory_reserved(self.device)
        try:
            history = torch.cuda.memory._snapshot(self.device)["device_traces"][self.device.index]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
            spans = self._profiler.stop().spans
        events, (workspaces, workspaces_at_peak) = split_workspaces(read_history(history), ended)
        return Readings(
            events,
            spans,
            complete=len(history) < _MAX_ENTRIES,
            alive=self._alive,
            allocated_before=self._allocated_before,
            # Without the workspaces that were there at that moment.
            peak_allocated=peak_allocated - workspaces_at_peak,
            reserved_bytes=reserved,
            device_bytes=total - free,
            workspace_bytes=workspaces,
            # The history counts in microseconds.
            one_clock=False,
        )


def clear_workspaces() -> None:
    """Give back cuBLAS's workspaces (32 MiB on Hopper), which else stay from run to run and belong
    to none of them.
    """
    clear = getattr(
        torch._C, "_cuda_clearCublasWorkspaces", None
    )  # no public way; without it they are counted
    if clear is not None and torch.cuda.is_initialized():
        clear()


@functools.cache
def workspace_bytes(device: torch.device) -> int:
    """What cuBLAS's workspaces hold in a process that trains on one stream: allocated, looked at
    and given back.
    """
    clear_workspaces()
    before = torch.cuda.memory_allocated(device)
    x = torch.ones(16, 16, device=device, requires_grad=True)
    torch.addmm(
        x.detach()[0], x, x
    ).sum().backward()  # backward has a thread and a workspace of its own
    del x
    held = torch.cuda.memory_allocated(device) - before
    clear_workspaces()
    return max(0, held)
