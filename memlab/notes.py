"""What is said below a measurement's columns: what is not counted, and what was not recorded."""

from __future__ import annotations

from collections.abc import Sequence

from memlab.growth import host_growth
from memlab.ledger import Step
from memlab.units import format_bytes

#: Of so few steps nobody expects to hear what the heap does.
_MANY = 8


def notes_on_outside(outside_bytes: int, array_bytes: int) -> list[str]:
    """What the run used and this allocator did not hand out, if anything.

    Args:
        outside_bytes: all of it.
        array_bytes: NumPy's arrays among it.
    """
    if not outside_bytes:
        return []
    words = (
        f"not counted: {format_bytes(outside_bytes)} of tensors that this allocator did not hand"
        " out (memory maps, shared memory, NumPy, other threads, or from before the run)"
    )
    return [words + (f"; NumPy's arrays: {format_bytes(array_bytes)}" if array_bytes else "")]


def notes_on_steps(steps: Sequence[Step], kind: str) -> list[str]:
    """How many steps were recorded, and what they leave on the host.

    Args:
        steps: all steps of the run.
        kind: the verdict's, which says the latter itself unless it is "creep".
    """
    notes = []
    recorded = sum(step.peak_bytes is not None for step in steps)
    if 0 < recorded < len(steps):
        notes.append(
            f"recorded in full: {recorded} of {len(steps)} steps, and the peak is that of these"
            " (every=1, or --every 1, records all)"
        )
    if _MANY < len(steps) == recorded:
        notes.append(
            "the host's heap is not judged: every step was recorded, and the record lies there, too"
        )
    host = host_growth(steps)
    if host and kind == "creep":
        notes.append(f"host: {format_bytes(host)} more on the heap after each step")
    return notes
