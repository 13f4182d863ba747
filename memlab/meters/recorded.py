"""What one recording saw, as one value: the seam between recording and judging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from memlab.ledger import Block, Observation, Span
from memlab.meters.gradients import Missing
from memlab.meters.readings import Readings
from memlab.meters.uses import Use


@dataclass(frozen=True)
class Recorded:
    """What one recording saw. Times are in nanoseconds.

    Attributes:
        device: the device that was measured.
        counts_alive: whether what was alive before is part of it (`watch`), or not (`measure`).
        readings: what the meter says of the device's allocator.
        observations: which address was seen to hold what, and when.
        spans: the meter's (operators, backward) and the observer's (modules, optimizers, steps).
        alive: blocks from before, with their end where it was seen.
        uses: the storages that the run used.
        before: the addresses of all that was alive before.
        devices: where the parameters of the models were.
        threads: thread -> the first module or optimizer that ran in it.
        thread: the thread that measures.
        start, end: the first and the last moment.
        nothing_to_train: whether a model ran with gradients enabled, and nothing needed one.
        replaced: the names of the modules whose forward was replaced, as techniques do it.
        missing: the parameters that need a gradient and got none, where others did.
        evaluating: whether all modules were in eval() mode at the end.
    """

    device: torch.device
    readings: Readings
    start: int
    end: int
    thread: int
    counts_alive: bool = False
    observations: Sequence[Observation] = ()
    spans: Sequence[Span] = ()
    alive: Sequence[Block] = ()
    uses: Sequence[Use] = ()
    before: frozenset[int] = frozenset()
    devices: frozenset[torch.device] = frozenset()
    threads: Mapping[int, str] | None = None
    nothing_to_train: bool = False
    replaced: frozenset[str] = frozenset()
    evaluating: bool = False
    missing: Missing | None = None
