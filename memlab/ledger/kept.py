"""What is kept: alive after the step that it was made for, and neither a model's, an optimizer's, a
gradient, nor given to a module.

A graph whose loss was appended to a list, outputs and features that were collected, a copy of the
best weights: no switch of the training makes them smaller, only the line that keeps them.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable

from memlab.ledger.blocks import Block
from memlab.ledger.phases import Phases
from memlab.ledger.spans import FOREVER, Span, Spans

#: So many blocks, each larger than the one before and made while that one was still there, are
#: something that is collected.
_GROWN = 3


def mark_kept(
    blocks: Iterable[Block], found: Phases, spans: Spans, loose: Collection[int] = ()
) -> None:
    """Mark what is kept among the blocks that nobody saw.

    - What a step made counts in its column until the step ends, and is kept from then on.
    - What was made between the phases and is alive when the forward of a *later* step begins is
      kept from its birth: a batch would have gone by then. So is what is like a block that is
      there when the steps are over, and lies beside no module's input, as targets would.
    - What an evaluation collects is kept from its birth: made outside its modules, and larger from
      one call to the next.

    Args:
        blocks: those that have their column by their life.
        found: the phases of the run.
        spans: what ran.
        loose: the identities of those that Python holds when the steps are over, and that lie
            beside no module's input.
    """
    if not found.phases:
        return
    ends = _ends(found, spans)
    forwards = [phase.start for phase in found.phases if phase.kind == "forward"]
    forwards = sorted({*forwards, *ends.calls})
    modules = spans.of("module").outermost()

    between: list[Block] = []
    evaluated: list[Block] = []
    for block in blocks:
        if block.scratch:
            continue
        phase = found.phases.at(block.born)
        if phase is None and block.column == "batch":
            between.append(block)
        elif end := ends.after(block.born):
            block.kept_from = end if _alive_at(block, end) else None
        outside = modules.at(block.born) is None
        evaluates = phase is None or (phase.kind == "forward" and not found.backwards.at(phase.end))
        if outside and evaluates and ends.calls:
            evaluated.append(block)

    like_loose = {_kind(block) for block in between if id(block) in loose}
    _judge_between_phases(between, ends, forwards, like_loose)
    for block in _collected(evaluated):
        block.column = "kept"
        block.kept_from = None


class _Ends:
    """The moments at which work is over, in order; `calls` are those of calls without a backward:
    each ends when the next one begins.
    """

    def __init__(self, steps: Iterable[int], calls: Iterable[int]):
        self.calls = sorted(calls)
        self._moments = sorted({*steps, *self.calls})

    def after(self, time: int) -> int | None:
        """When the work that runs at a moment is over; None: nothing ended after it."""
        index = bisect.bisect_right(self._moments, time)
        return self._moments[index] if index < len(self._moments) else None


def _ends(found: Phases, spans: Spans) -> _Ends:
    steps = [span.end for span in spans.of("step")]
    calls = []
    previous: Span | None = None
    for call in spans.of("module").outermost():
        if found.backwards.at(call.start):
            continue
        again = previous is not None and previous.name == call.name
        # Neither computes a graph: a model that is evaluated, or that generates.
        if again and previous.sequence < 0 and call.sequence < 0:
            calls.append(call.start)
        previous = call
    return _Ends(steps, calls)


def _kind(block: Block) -> tuple[str, str, int]:
    """Blocks of one kind are made at one place, and equally large."""
    return block.operator, block.module, block.bytes


def _judge_between_phases(
    blocks: list[Block], ends: _Ends, forwards: list[int], like_loose: Collection[tuple]
) -> None:
    """Part the batches from what is kept, among what was made before a forward.

    For the last step nothing follows that could tell: there a block is what most bytes of the same
    operator were before.
    """
    known: dict[tuple[str, str], int] = {}
    unsure: list[Block] = []
    for block in blocks:
        used_by = _first_from(forwards, block.born)
        end = ends.after(used_by) if used_by is not None else None
        later = _first_from(forwards, end) if end is not None else None
        place = (block.operator, block.module)
        if _kind(block) in like_loose:
            block.column = "kept"
        elif later is None:
            unsure.append(block)
        elif _alive_at(block, later):
            block.column = "kept"
            known[place] = known.get(place, 0) + block.bytes
        else:
            known[place] = known.get(place, 0) - block.bytes

    for block in unsure:
        if known.get((block.operator, block.module), 0) > 0:
            block.column = "kept"


def _collected(blocks: list[Block]) -> list[Block]:
    """What is put together anew after each call, as `outputs = torch.cat([outputs, output])` does:
    each time it is larger, and made while the one before is still there.
    """
    chains: list[list[Block]] = []
    for block in sorted(blocks, key=lambda block: block.born):
        before = [
            chain
            for chain in chains
            if chain[-1].operator == block.operator
            and chain[-1].bytes < block.bytes
            and _alive_at(chain[-1], block.born)
        ]
        if before:
            max(before, key=lambda chain: chain[-1].bytes).append(block)
        else:
            chains.append([block])
        # What is gone is put to nothing any longer.
        chains = [c for c in chains if len(c) >= _GROWN or _alive_at(c[-1], block.born)]
    return [block for chain in chains if len(chain) >= _GROWN for block in chain]


def _first_from(moments: list[int], time: int) -> int | None:
    index = bisect.bisect_left(moments, time)
    return moments[index] if index < len(moments) else None


def _alive_at(block: Block, time: int) -> bool:
    return (FOREVER if block.died is None else block.died) > time
