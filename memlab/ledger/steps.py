"""The steps of a run: what each needed, and what it left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from memlab.ledger.blocks import COLUMNS, Block
from memlab.ledger.ledger import Ledger

#: Shapes of tensors, `((batch, sequence), ...)`.
Shapes = tuple[tuple[int, ...], ...]


class Counted(NamedTuple):
    """What is known of every step, recorded or not: see `Step`."""

    number: int
    start: int
    end: int
    shapes: Shapes = ()
    host_bytes: int | None = None


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        number: 1 for the first.
        start, end: its first and its last moment (nanoseconds).
        shapes: those of what the outermost module received, call after call.
        host_bytes: the host's heap in use after it (None: not known).
        peak_bytes: the most bytes at once (None, as the rest: the step was not recorded in full).
        phase: the phase of that peak.
        bytes_after: the bytes alive after it.
        columns_after: the same by column.
        bytes_left: of them what may stay: without the next step's batch, which is as large as it
            is, and without what nobody knows.
    """

    number: int
    start: int
    end: int
    shapes: Shapes = ()
    host_bytes: int | None = None
    peak_bytes: int | None = None
    phase: str | None = None
    bytes_after: int | None = None
    columns_after: dict[str, int] | None = None
    bytes_left: int | None = None

    @property
    def largest_shape(self) -> tuple[int, ...]:
        """Of its shapes that with the most numbers."""
        return max(self.shapes, key=numbers_in, default=())


def numbers_in(shape: tuple[int, ...]) -> int:
    """How many numbers a tensor of this shape has."""
    count = 1
    for size in shape:
        count *= size
    return count


def steps_in(ledger: Ledger, counted: Iterable[Counted]) -> list[Step]:
    """Say of each step what the ledger knows of it; nothing where it lies outside.

    Args:
        ledger: what was recorded.
        counted: the steps, in order.
    """
    return [_step(ledger, step) for step in counted]


def _step(ledger: Ledger, counted: Counted) -> Step:
    inside = ledger.start <= counted.start and counted.end <= ledger.end
    if not inside:
        return Step(*counted)
    peak, moment = ledger.highest(counted.start, counted.end)
    after = dict.fromkeys(COLUMNS, 0)
    left = 0
    for block in ledger.alive_at(counted.end):
        after[block.column] += block.bytes
        is_next = block.column == "batch" and block.born >= counted.start
        if not is_next and block.column != "unattributed":
            left += block.bytes
    return Step(*counted, peak, ledger.phase_at(moment), sum(after.values()), after, left)


def left_by(ledger: Ledger, steps: Iterable[Step]) -> list[tuple[Step, Block]]:
    """What steps made and left behind, and no model, optimizer or gradient owns: the blocks that
    are still alive when the step after them is over. (A loop's variables are set anew by then.)

    Args:
        ledger: what was recorded.
        steps: its steps, in order.

    Returns:
        Pairs of a step and a block that it made.
    """
    steps = list(steps)
    left = []
    for step, following in zip(steps, steps[1:], strict=False):
        for block in ledger.blocks:
            made_here = step.start <= block.born < step.end
            alive = block.died is None or block.died > following.end
            if made_here and alive and block.column_at(following.end) in ("kept", "batch"):
                left.append((step, block))
    return left
