"""What CUDA's allocator recorded: its history as events, and cuBLAS's workspaces told apart."""

from __future__ import annotations

from collections.abc import Iterable

from memlab.ledger import Block, Event

# The allocator hands out multiples of this.
_GRAIN = 512


def read_history(history: list[dict]) -> list[Event]:
    """The allocator's events in a recorded history, sizes rounded up as the allocator does, times
    in nanoseconds.
    """
    events = []
    for entry in history:
        size = -(-entry["size"] // _GRAIN) * _GRAIN
        if entry["action"] == "alloc":
            events.append(Event(entry["time_us"] * 1000, entry["addr"], size))
        elif entry["action"] == "free_requested":
            # The counters go down when the free is asked for, not when the streams are done with
            # the block.
            events.append(Event(entry["time_us"] * 1000, entry["addr"], -size))
    return events


def split_workspaces(events: Iterable[Event], ended: int) -> tuple[list[Event], tuple[int, int]]:
    """Part a run's events from those of cuBLAS's workspaces: the blocks that go when the workspaces
    are cleared.

    Args:
        events: in order of time; those from `ended` (nanoseconds) on are what the clearing freed.

    Returns:
        The run's events; the workspaces' bytes in all, and those of them that were alive when all
        together peaked.
    """
    events = list(events)
    born: dict[int, int] = {}  # address → index of the allocation that holds it
    workspaces: set[int] = set()
    dropped: set[int] = set()
    total = held = 0
    for index, event in enumerate(events):
        if event.bytes > 0:
            born[event.address] = index
            continue
        first = born.pop(event.address, None)
        if event.time >= ended:
            total -= event.bytes
            dropped.add(index)
            if first is None:  # from before the history begins
                held -= event.bytes
            else:
                workspaces.add(first)
    alive = highest = 0
    at_peak = held
    for index, event in enumerate(events):
        if event.time >= ended:
            break
        alive += event.bytes
        if index in workspaces:
            held += event.bytes
        if alive > highest:
            highest, at_peak = alive, held
    return [event for index, event in enumerate(events) if index not in dropped | workspaces], (
        total,
        at_peak,
    )


def read_alive(segments: list[dict], index: int) -> list[Block]:
    """The blocks of a device that are in use now, from the allocator's map of its segments."""
    blocks = []
    for segment in segments:
        if segment["device"] != index:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                blocks.append(Block(block["size"], block.get("address", address), 0))
            address += block["size"]
    return blocks
