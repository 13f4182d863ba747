"""The CPU's bytes, exactly: PyTorch's profiler reports every event of the CPU allocator, with address and size.

Its trace also says which operator ran when, and when autograd evaluated which node. The trace is read through the
public `export_chrome_trace`; nothing private is used.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from memlab.ledger import Event, Span

_BACKWARD = "autograd::engine::evaluate_function: "


class Trace:
    """Records with PyTorch's profiler between `start()` and `stop()`; then `events` and `spans` are filled.

    Args:
        memory: whether the CPU allocator's events are wanted (they are not when a GPU is measured).
    """

    def __init__(self, memory: bool = True):
        self.events: list[Event] = []
        self.spans: list[Span] = []
        # The profiler announces itself on standard error, which a notebook would show. 99 is silence.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=memory)
        self._log_level = _log_level()

    def start(self) -> None:
        """Begin to record.

        Raises:
            RuntimeError: a profiler records already; there can be one at a time.
        """
        try:
            self._profile.start()
        except RuntimeError as error:
            raise RuntimeError(
                "PyTorch's profiler is recording already, and there can be one at a time. Measure outside of "
                "`torch.profiler.profile(...)`."
            ) from error
        # A block from before the recording that is freed in it makes the allocator log a warning. It is expected here.
        if self._log_level is not None:
            self._level_before, self._log_level.value = self._log_level.value, 2

    def stop(self) -> None:
        """Stop recording and read what was recorded."""
        if self._log_level is not None:
            self._log_level.value = self._level_before
        self._profile.stop()
        with tempfile.TemporaryDirectory(prefix="memlab-") as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            trace = json.loads(path.read_bytes())
        self.events, self.spans = read_trace(trace)


def read_trace(trace: dict) -> tuple[list[Event], list[Span]]:
    """The allocator's events and the operators' spans in a Chrome trace of PyTorch's profiler, times in nanoseconds."""
    base = int(trace.get("baseTimeNanoseconds", 0))
    events, spans = [], []
    for entry in trace["traceEvents"]:
        if entry.get("name") == "[memory]":
            arguments = entry["args"]
            if arguments["Device Type"] == 0:  # 0 is the CPU
                time = base + round(entry["ts"] * 1000)
                events.append((time, arguments["Ev Idx"], arguments["Addr"], arguments["Bytes"]))
        elif entry.get("ph") == "X" and entry.get("cat") == "cpu_op":
            start = base + round(entry["ts"] * 1000)
            end = start + round(entry["dur"] * 1000)
            name, sequence = entry["name"], entry["args"].get("Sequence number", -1)
            kind = "operator"
            if name.startswith(_BACKWARD):
                kind, name = "backward", name.removeprefix(_BACKWARD)
            spans.append(Span(start, end, kind, name, entry["tid"], sequence))
    events.sort()
    return [Event(time, address, size) for time, _, address, size in events], spans


def _log_level() -> ctypes.c_int | None:
    """The level from which PyTorch's C++ logger prints (not part of any API; without it, one more warning is seen)."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        return ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
    except (OSError, ValueError):
        return None
