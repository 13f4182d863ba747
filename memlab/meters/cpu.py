"""The CPU's bytes, exactly: PyTorch's profiler reports every event of the CPU allocator, with
address and size.

Its trace also says which operator ran when, and when autograd evaluated which node. The trace is
read through the public `export_chrome_trace`. The profiler sees the thread that started it, and
autograd's; not Python's other threads.

Private is only what PyTorch has no public word for: whether a profiler runs already
(`_profiler_enabled`; a second one would end the first, or the process), and the level of its
logger.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from memlab.ledger import Event, Span
from memlab.meters.arrays import Arrays
from memlab.meters.counter import Counter as Limit
from memlab.meters.live import live_objects, live_storages
from memlab.meters.readings import Readings

_BACKWARD = "autograd::engine::evaluate_function: "

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
    """The CPU as it is written everywhere: without an index."""
    return torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device is done: on the CPU an operator that has returned is."""


def bytes_alive(device: torch.device) -> int:
    """Bytes of the storages that live tensors hold."""
    return sum(storage.nbytes() for storage in live_storages(device).values())


def free_bytes(device: torch.device) -> tuple[int, int] | None:
    """Free bytes and all bytes of the machine; None where psutil, which knows, is not installed."""
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def has_own_memory() -> bool:
    """A CPU computes in the host's memory."""
    return False


def properties(device: torch.device) -> dict[str, object]:
    """What it is, when it is a GPU: it is none."""
    return {"name": None, "memory_bytes": None, "native_bfloat16": None}


def room_for(limit: int) -> int:
    """The same: every byte that a storage has is counted, and no other."""
    return limit


def describe(device: torch.device) -> dict[str, object]:
    """What a number depends on, of a GPU: nothing here."""
    return {"gpu": None, "gpu_bytes": None, "driver": None}


class Meter:
    """Records the CPU's allocator, and which operators ran, between `start()` and `stop()`.

    It is PyTorch's profiler, which sees the thread that started it, and autograd's.

    Args:
        device: the CPU.
        memory: whether the allocator's events are wanted (they are not when a GPU is measured).
    """

    def __init__(self, device: torch.device, memory: bool = True):
        # The profiler announces itself on standard error, which a notebook would show. 99 is
        # silence.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=memory)
        self._arrays = Arrays() if memory else None
        self._log_level = _log_level()

    def start(self) -> None:
        """Begin to record.

        Raises:
            RuntimeError: a profiler records already, or is about to; there can be one at a time.
        """
        if _profiler_enabled() or any(
            p.current_action is ProfilerAction.WARMUP for p in live_objects(profile)
        ):
            raise RuntimeError(
                "PyTorch's profiler is recording already, and there can be one at a time. Measure"
                " outside of `torch.profiler.profile(...)`."
            )
        with warnings.catch_warnings():
            # PyTorch 2.11 warns that a second cycle (there is none) would clear the first. To ask
            # it to keep both (`acc_events`) would let it make Python objects of all events, which
            # nobody reads and takes seconds.
            warnings.filterwarnings("ignore", message="(?s).*acc_events")
            self._profile.start()
        # A block from before the recording that is freed in it makes the allocator log a warning.
        # It is expected here.
        if self._log_level is not None:
            self._level_before, self._log_level.value = self._log_level.value, 2
        if self._arrays is not None:
            self._arrays.start()

    def stop(self) -> Readings:
        """Stop recording and read what was recorded.

        Raises:
            RuntimeError: another profiler was started in between, which ends this one.
        """
        if self._arrays is not None:
            self._arrays.stop()
        if self._log_level is not None:
            self._log_level.value = self._level_before
        if not _profiler_enabled():
            # Asking the profiler for a trace now would end the process.
            raise RuntimeError(
                "the measurement was ended by another `torch.profiler.profile(...)` that ran inside"
                " it: there can be one at a time. Measure without it."
            )
        self._profile.stop()
        with tempfile.TemporaryDirectory(prefix="memlab-") as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            trace = json.loads(path.read_bytes())
        # The profile is part of a reference cycle, and its events take megabytes a step: without
        # this they would stay until the garbage collector comes by.
        self._profile.profiler = None
        events, mapped, spans = read_trace(trace)
        arrays = () if self._arrays is None else self._arrays.events
        return Readings(events, spans, mapped, arrays=arrays, one_thread=True)


def read_trace(trace: dict) -> tuple[list[Event], list[Event], list[Span]]:
    """The events of the allocator, those of memory maps and the operators' spans in a Chrome trace
    of PyTorch's profiler.

    Times are in nanoseconds.
    """
    base = int(trace.get("baseTimeNanoseconds", 0))
    reports, spans = [], []
    for entry in trace["traceEvents"]:
        if entry.get("name") == "[memory]":
            arguments = entry["args"]
            if arguments["Device Type"] == 0:  # 0 is the CPU
                time = base + round(entry["ts"] * 1000)
                total = arguments["Total Allocated"]
                reports.append(
                    (time, arguments["Ev Idx"], arguments["Addr"], arguments["Bytes"], total)
                )
        elif entry.get("ph") == "X" and entry.get("cat") == "cpu_op":
            start = base + round(entry["ts"] * 1000)
            end = start + round(entry["dur"] * 1000)
            name, sequence = entry["name"], entry["args"].get("Sequence number", -1)
            if name == "PythonDispatchMode":
                continue  # a budget's counter, say, that sees each operator: nobody's work
            kind = "operator"
            if name.startswith(_BACKWARD):
                kind, name = "backward", name.removeprefix(_BACKWARD)
            spans.append(Span(start, end, kind, name, entry["tid"], sequence))
    events: list[Event] = []
    mapped: list[Event] = []
    maps: set[int] = set()
    for time, _, address, size, total in sorted(reports):
        # A memory map is reported like an allocation, but the allocator's running total knows
        # nothing of it.
        if size > 0:
            (maps.add if total < size else maps.discard)(address)
        (mapped if address in maps else events).append(Event(time, address, size))
    return events, mapped, spans


def _profiler_enabled() -> bool:
    return torch._C._autograd._profiler_enabled()


def _log_level() -> ctypes.c_int | None:
    """The level from which PyTorch's C++ logger prints (not part of any API; without it, one more
    warning is seen).
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        return ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
    except (OSError, ValueError):
        return None
