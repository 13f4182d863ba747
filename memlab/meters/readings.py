"""What a meter says when it has stopped: the same of every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memlab.ledger import Block, Event, Observation, Span


@dataclass(frozen=True)
class Readings:
    """What a device's allocator did between a meter's `start()` and `stop()`.

    Attributes:
        events: the allocator's own, in their order.
        mapped: those of memory maps (files, shared memory), which the allocator did not hand out.
        arrays: those of NumPy's arrays, of which the allocator does not know either.
        spans: which operator ran when, and when autograd evaluated which node.
        complete: False if the history was too long to be kept whole. Then `events` is no ledger.
        alive: blocks from before, by the allocator's own map (None: the meter has no such map).
        allocated_before: bytes that were allocated when the meter started.
        peak_allocated: the allocator's own counter at its highest (None: the events are the truth).
        reserved_bytes: the most bytes that the allocator held from the driver (None: no driver).
        device_bytes: what the driver says is in use at the end (None: no driver).
        workspace_bytes: what libraries keep for themselves whatever the model (None: none do).
        one_clock: whether events and spans have the same clock, to the nanosecond.
        one_thread: whether what other threads allocate is not seen.
        observations: what the meter itself saw in the blocks (a real one sees bytes only).
    """

    events: Sequence[Event]
    spans: Sequence[Span]
    mapped: Sequence[Event] = ()
    arrays: Sequence[Event] = ()
    complete: bool = True
    alive: Sequence[Block] | None = None
    allocated_before: int = 0
    peak_allocated: int | None = None
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    workspace_bytes: int | None = None
    one_clock: bool = True
    one_thread: bool = False
    observations: Sequence[Observation] = ()
