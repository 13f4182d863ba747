"""A CUDA device's bytes: the allocator's own counters for the peak, its recorded history for the timeline.

Three numbers, never mixed up: *allocated* (what tensors hold), *reserved* (what the allocator holds from the driver,
free blocks included) and *device* (what the driver says is in use on the whole device, CUDA's context included).
"""

from __future__ import annotations

import torch

from memlab.ledger import Block, Event, Span
from memlab.meters.cpu import Trace

# More than a few hundred steps of a large model. Bounded, so that a forgotten recording cannot fill the host.
_MAX_ENTRIES = 2_000_000

# The allocator hands out multiples of this.
_GRAIN = 512


class CudaTrace:
    """Records a CUDA device's allocator between `start()` and `stop()`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.events: list[Event] = []
        self.mapped: list[Event] = []  # as on the CPU; memory maps are the host's
        self.spans: list[Span] = []
        self.alive: list[Block] = []
        self.complete = True
        self._trace = Trace(memory=False)  # for the operators' and backward's spans only

    def start(self) -> None:
        """Empty the cache, set the counters to zero and begin to record."""
        clear_workspaces()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.allocated_before = torch.cuda.memory_allocated(self.device)
        self.alive = _active_blocks(self.device)
        self._trace.start()
        torch.cuda.memory._record_memory_history(enabled=None)  # forget what someone else recorded
        # Context None: addresses, sizes and times without stack traces, which would slow the run down.
        torch.cuda.memory._record_memory_history("all", context=None, max_entries=_MAX_ENTRIES)

    def stop(self) -> None:
        """Stop recording, switch the history off again and read what was recorded."""
        clear_workspaces()
        torch.cuda.synchronize(self.device)
        self.peak_allocated = torch.cuda.max_memory_allocated(self.device)
        self.reserved_bytes = torch.cuda.max_memory_reserved(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        # The allocator keeps what it reserved until asked, so this is read at (or near) the run's highest.
        self.device_bytes = total - free
        try:
            history = torch.cuda.memory._snapshot(self.device)["device_traces"][self.device.index]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._trace.stop()
        self.complete = len(history) < _MAX_ENTRIES
        self.events = read_history(history)
        self.spans = self._trace.spans


def read_history(history: list[dict]) -> list[Event]:
    """The allocator's events in a recorded history, sizes rounded up as the allocator does, times in nanoseconds."""
    events = []
    for entry in history:
        size = -(-entry["size"] // _GRAIN) * _GRAIN
        if entry["action"] == "alloc":
            events.append(Event(entry["time_us"] * 1000, entry["addr"], size))
        elif entry["action"] == "free_requested":
            # The counters go down when the free is asked for, not when the streams are done with the block.
            events.append(Event(entry["time_us"] * 1000, entry["addr"], -size))
    return events


def _active_blocks(device: torch.device) -> list[Block]:
    """The blocks that are in use now, from the allocator's own map of its segments."""
    blocks = []
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] != device.index:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                blocks.append(Block(block["size"], block.get("address", address), 0))
            address += block["size"]
    return blocks


def clear_workspaces() -> None:
    """Give back cuBLAS's workspaces (32 MiB on Hopper), which else stay from run to run and belong to none of them."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # no public way; without it they are counted
    if clear is not None and torch.cuda.is_initialized():
        clear()
