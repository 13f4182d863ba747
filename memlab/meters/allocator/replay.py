"""Replaying a recorded history, so that the simulation can be held against a GPU.

A history is what `torch.cuda.memory._record_memory_history` records, one tuple an event: action,
address, size in bytes, stream. Of the actions

- `alloc`, `free_requested` and `free_completed` are done: they are what the program and the GPU's
  streams did. `free` stands for both halves.
- `segment_alloc` is never done: when a segment is needed is what is simulated. Where one is, it
  gets the recorded address, as addresses decide between blocks of the same size.
- `segment_free` gives that segment back, and `segment_unmap` all that is unused, where the
  simulation has not done so itself: a history does not tell why they happened, and
  `torch.cuda.empty_cache()` is one of the reasons.
- `segment_map`, `oom`, `snapshot` and the like say nothing that is needed.
"""

from __future__ import annotations

from collections.abc import Iterable

from memlab.meters.allocator.driver import Driver

_WITHOUT_EFFECT = {"segment_map", "oom", "snapshot", "user_defined"}


def replay(allocator, driver: Driver, events: Iterable[tuple[str, int, int, int]]) -> None:
    """Do the events of a history.

    Args:
        allocator: an `Allocator` on which nothing is allocated.
        driver: the one it has.
        events: (action, address, size in bytes, stream).

    Raises:
        ValueError: the allocator is in use, the history begins in the middle, or has an unknown
            action.
        OutOfMemory: as `Allocator.allocate`.
    """
    if allocator.active_bytes:
        raise ValueError(
            f"replay begins with an empty allocator; {allocator.active_bytes:,} bytes are in use in"
            " this one. Make a new one"
        )
    simulated: dict[int, int] = {}  # recorded address → ours
    for number, (action, address, size, stream) in enumerate(events):
        if action == "alloc":
            if address in simulated:
                raise ValueError(f"event {number} allocates at {address}, which is in use")
            simulated[address] = allocator.allocate(size, stream)
            driver.recorded.clear()
        elif action in ("free", "free_requested", "free_completed"):
            if address not in simulated:
                raise ValueError(
                    f"event {number} ({action}) frees {address}, which was not allocated. Record"
                    " from before the first allocation on, with room for all events"
                )
            if action != "free_completed":
                allocator.request_free(simulated[address])
            if action != "free_requested":
                # Where memory ran short, the allocator has waited for the streams itself.
                if allocator.is_pending(simulated[address]):
                    allocator.complete_free(simulated[address])
                del simulated[address]
        elif action == "segment_alloc":
            driver.recorded.append((address, size))
        elif action == "segment_free":
            allocator.release_segment(address)
        elif action == "segment_unmap":
            allocator.empty_cache()
        elif action not in _WITHOUT_EFFECT:
            raise ValueError(f"event {number} has an unknown action, {action!r}")
    driver.recorded.clear()
