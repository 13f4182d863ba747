"""What grows from step to step: on the device, and on the host's heap."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from memlab.ledger import Ledger, Step, left_by
from memlab.units import KiB

# Less than this a step is a few numbers, and no reason to worry.
LEAST_GROWTH = KiB

# The host's heap breathes: what a step leaves there has to be more than this to be said.
_LEAST_HOST_GROWTH = 4 * KiB
_LEAST_SLOPES = 8


@dataclass(frozen=True)
class Growth:
    """What each step leaves behind, and nobody owns.

    Attributes:
        column: what it was for in its step.
        operator, module: who made it, where.
        bytes_a_step: how much of it a step leaves, on average.
        addresses: where it lies.
        line: the line of the user's code that made it, if lines were noted.
    """

    column: str
    operator: str
    module: str
    bytes_a_step: int
    addresses: tuple[int, ...] = ()
    line: str = ""

    @property
    def place(self) -> str:
        """Who made it, for people: `aten::linear in layers.0 at train.py:12`."""
        place = " in ".join(part for part in (self.operator, self.module) if part)
        return " at ".join(part for part in (place, self.line) if part)


def growth_of(ledger: Ledger, steps: Sequence[Step]) -> list[Growth]:
    """What the steps of a ledger left behind, the largest first.

    Args:
        ledger: what was recorded.
        steps: its steps, two or more. The last one says nothing: what it leaves may go yet.
    """
    # The first step makes what stays for good, such as an optimizer's state.
    judged = [step for step in steps[:-1] if step.number > 1 or len(steps) == 2]
    places: dict[tuple[str, ...], list] = {}
    for step, block in left_by(ledger, steps):
        if step in judged:
            place = (block.column, block.operator, block.module, block.line)
            places.setdefault(place, []).append(block)
    found = []
    for (*place, line), blocks in places.items():
        size = sum(block.bytes for block in blocks) // len(judged)
        found.append(Growth(*place, size, tuple(block.address for block in blocks), line))
    return sorted(found, key=lambda growth: -growth.bytes_a_step)


def changes_of(steps: Sequence[Step]) -> list[int]:
    """By how much a step left more than the one before it. The first makes what stays for good."""
    judged = steps[1:] if len(steps) > 2 else steps
    return [
        round((after.bytes_left - before.bytes_left) / (after.number - before.number))
        for before, after in zip(judged, judged[1:], strict=False)
    ]


def host_growth(steps: Sequence[Step]) -> int | None:
    """The bytes that a step leaves on the host's heap, beside what it leaves on the device.

    Steps that were recorded in full do not tell it: the record itself lies on the heap.

    Returns:
        Bytes a step; None where the heap does not move, or is not known.
    """
    slopes = []
    for before, after in zip(steps, steps[1:], strict=False):
        recorded = before.peak_bytes is not None or after.peak_bytes is not None
        if not recorded and None not in (before.host_bytes, after.host_bytes):
            slopes.append(after.host_bytes - before.host_bytes)
    if len(slopes) < _LEAST_SLOPES:
        return None
    full = [step for step in steps if step.bytes_left is not None]
    changes = changes_of(full)
    on_device = max(0, round(statistics.median(changes))) if changes else 0
    slope = round(statistics.median(slopes)) - on_device
    return slope if slope >= _LEAST_HOST_GROWTH else None
