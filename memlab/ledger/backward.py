"""What a forward leaves for its backward."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate, pairwise

from memlab.ledger.ledger import Ledger
from memlab.ledger.spans import FOREVER, Span


def activations_at_backward(ledger: Ledger) -> int | None:
    """Return the activations that are there when a backward begins, in bytes: of several
    backwards, the most. None where no backward was recorded.

    Args:
        ledger: blocks with their columns, and the phases.
    """
    begins = _begins(ledger.phases)
    if not begins:
        return None

    # At each beginning, what has been born by then; less what has died by then.
    changes = [0] * (len(begins) + 1)
    for block in ledger.blocks:
        if block.column == "activations":
            died = FOREVER if block.died is None else block.died
            died = min(died, FOREVER if block.kept_from is None else block.kept_from)
            changes[bisect.bisect_left(begins, block.born)] += block.bytes
            changes[bisect.bisect_left(begins, died)] -= block.bytes
    return max(accumulate(changes[:-1]))


def _begins(phases: Sequence[Span]) -> list[int]:
    """When the backwards begin. One that goes on after an optimizer stepped inside it has begun
    before.
    """
    begins = [phase.start for phase in phases[:1] if phase.kind == "backward"]
    for before, phase in pairwise(phases):
        goes_on = before.kind == "optimizer" and before.end == phase.start
        if phase.kind == "backward" and not goes_on:
            begins.append(phase.start)
    return begins
