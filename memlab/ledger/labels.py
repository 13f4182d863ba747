"""What each block was for: from what was seen in it, or from its life."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from memlab.ledger.blocks import Block, Event, lives
from memlab.ledger.buckets import tell_buckets
from memlab.ledger.kept import mark_kept
from memlab.ledger.ledger import Ledger
from memlab.ledger.lines import note_lines
from memlab.ledger.observations import PRIORITY, Observation, note_type, rank_of, was_there
from memlab.ledger.phases import Phases, find_phases
from memlab.ledger.scratch import ALLOCATORS, is_operator, tell_scratch
from memlab.ledger.spans import FOREVER, Span, Spans


def build_ledger(
    events: Iterable[Event],
    observations: Iterable[Observation] = (),
    spans: Iterable[Span] = (),
    alive: Sequence[Block] = (),
    *,
    start: int | None = None,
    end: int | None = None,
    one_clock: bool = True,
) -> tuple[Ledger, list[Observation]]:
    """Join the allocator's events with what was seen, and give every block its column.

    Args:
        events: the allocator's events in their order.
        observations: what was seen at which address.
        spans: what ran when.
        alive: blocks that were alive before the first event, with their `died` filled in where it
            was seen.
        start, end: the first and last moment of the run (nanoseconds); by default those of the
            events.
        one_clock: whether events and spans are of one clock, to the nanosecond. Only then can an
            operator's scratch be told from a tensor between two operators.

    Returns:
        The ledger, and the observations that fall on no block: of memory from elsewhere.
    """
    spans = Spans(spans)
    blocks = lives(events, alive)
    times = [block.born for block in blocks]
    times += [block.died for block in blocks if block.died is not None]
    start = start if start is not None else min(times, default=0)
    end = end if end is not None else max(times, default=0)

    found = find_phases(spans, start, end)
    _place(blocks, spans, found.phases)
    if one_clock:
        tell_scratch(blocks, spans)
    note_lines(blocks, spans)
    gone = _made_and_gone(blocks, start, spans)
    missed, loose = _label(blocks, observations, gone, found.phases)
    modules = spans.of("module")
    if modules and (not found.backwards or modules[0].start < found.backwards[0].start):
        # The record does not begin within a step: what autograd made before is left from another.
        for block in alive:
            block.column = "kept" if block.column == "activations" else block.column
    tell_buckets(blocks, alive, spans)
    unseen = [block for block in blocks if block.column not in PRIORITY]
    _label_by_life(unseen, found, spans)
    mark_kept(unseen, found, spans, loose)
    ledger = Ledger(
        blocks,
        list(found.phases),
        start,
        end,
        built=min((span.start for span in spans.of("step")), default=None),
        modules=frozenset(span.name for span in spans.of("module")),
        recomputed=found.recomputed,
        recomputations=len(found.recomputations),
    )
    return ledger, missed


def _place(blocks: list[Block], spans: Spans, phases: Spans) -> None:
    """Note for every block the phase, the operator and the module in which it was born.

    The operator is the outermost one: who calls `aten::conv2d` does not know the `aten::empty` that
    it calls.
    """
    modules = spans.of("module")
    nodes = spans.of("backward")
    operators = spans.of("operator", "backward")
    functions = Spans(span for span in operators if not is_operator(span.name))
    outermost = Spans(span for span in operators if is_operator(span.name)).outermost()

    # A backward node carries the sequence number of the forward operator that made it: so it knows
    # its module.
    module_of: dict[int, str] = {}
    for span in operators:
        module = modules.at(span.start)
        if span.kind == "operator" and span.sequence >= 0 and module is not None:
            module_of.setdefault(span.sequence, module.name)

    for block in blocks:
        phase = phases.at(block.born)
        operator = outermost.at(block.born)
        if operator is None or operator.name in ALLOCATORS:
            # Memory that a function written in Python, or a compiled one, asked for by itself.
            function = functions.at(block.born)
            if function is not None and "dynamo" not in function.name:  # (not the compiler)
                operator = function
        module = modules.at(block.born)
        node = nodes.at(block.born)
        block.phase = phase.kind if phase else "other"
        if operator is not None:
            block.operator = operator.name
        if module is not None:
            block.module = module.name
        elif node is not None:
            block.module = module_of.get(node.sequence, "")


def _made_and_gone(blocks: Iterable[Block], start: int, spans: Spans) -> set[int]:
    """The identities of the blocks that were made in the run and gone when its first step ended:
    so they are not kept.
    """
    first_step = next(iter(spans.of("step")), None)
    if first_step is None:
        return set()
    made = (block for block in blocks if block.born >= start and block.died is not None)
    return {id(block) for block in made if block.died <= first_step.end}


def _label(
    blocks: list[Block],
    observations: Iterable[Observation],
    used_up: Collection[int],
    phases: Spans,
) -> tuple[list[Observation], set[int]]:
    """Give a block the column of what was seen in it. One look labels the block's whole life.

    Returns:
        The observations that fall on no block; and the identities of the blocks of which only this
        is known, that Python holds them when the steps are over.
    """
    loose: set[int] = set()
    by_address: dict[int, list[Block]] = {}
    for block in blocks:
        by_address.setdefault(block.address, []).append(block)
    best: dict[int, float] = {}
    best_type: dict[int, float] = {}
    missed = []
    for seen in observations:
        block = _tenant(by_address.get(seen.address, ()), seen.time)
        if block is None:
            if seen.column:
                missed.append(seen)
            continue
        note_type(block, seen, best_type)
        if seen.column == "unattributed":
            loose.add(id(block))
        if seen.column not in PRIORITY:
            continue
        if seen.column in ("batch", "kept") and not was_there(block, seen, phases):
            continue
        if seen.column == "kept" and id(block) in used_up:
            continue
        rank = rank_of(seen)
        if rank <= best.get(id(block), len(PRIORITY)):
            if rank < best.get(id(block), rank + 1):
                block.name = block.model = block.role = ""  # those of something weaker
            best[id(block)] = rank
            block.column = seen.column
            block.name = seen.name or block.name
            block.model = seen.model or block.model
            block.role = seen.role or block.role
    return missed, loose


def _tenant(lives: Sequence[Block], time: int, slack: int = 50_000) -> Block | None:
    """Which of the blocks that lived at one address was there at a moment.

    The looker's clock and the allocator's differ by a microsecond or so; within `slack` nanoseconds
    of a life still counts, the nearest first.
    """
    nearest, distance = None, slack
    for block in lives:
        died = FOREVER if block.died is None else block.died
        if block.born <= time < died:
            return block
        away = block.born - time if time < block.born else time - died
        if away < distance:
            nearest, distance = block, away
    return nearest


def _label_by_life(blocks: list[Block], found: Phases, spans: Spans) -> None:
    """Give blocks that nobody saw a column by when they were born and when they came back.

    - born in forward and alive when backward begins: an *activation*, whatever kept it (autograd's
      saved tensors are seen this way even when checkpointing or offloading hides them from hooks);
    - born in a forward that no backward follows, and alive after the module's call: an activation
      too, if gradients were enabled: a graph holds it, for nothing;
    - born in a recomputation and alive after it: an activation too;
    - born in backward and alive after it: a *gradient*;
    - born in the optimizer's step and alive after it: *optimizer state*;
    - gone within the phase it was born in: a *temporary*;
    - born between the phases and alive when a forward begins: the *batch*, made for it;
    - born between the phases and alive in any other, and nobody saw what it is: *unattributed*.

    What outlives the step that it was made for is judged after that (`memlab.ledger.kept`).
    """
    with_graph = Spans(s for s in spans if s.kind == "module" and s.sequence >= 0).outermost()
    for block in blocks:
        died = FOREVER if block.died is None else block.died
        phase = found.phases.at(block.born)
        if phase is None:
            block.column = _column_between_phases(block, died, found.phases)
        elif phase.kind == "forward":
            end = phase.end
            if found.backwards.at(end) is None:
                if not (with_graph.at(phase.start) or with_graph.inside(phase)):
                    block.column = "temporaries"
                    continue
                call = with_graph.at(block.born)
                end = call.end if call is not None else end
            block.column = "activations" if died > end else "temporaries"
        elif phase.kind == "optimizer":
            block.column = "optimizer_state" if died > phase.end else "temporaries"
        elif recomputation := found.recomputations.at(block.born):
            block.column = "activations" if died > recomputation.end else "temporaries"
        else:
            # The backward as a whole, even where an optimizer that steps inside it cuts it in
            # pieces.
            backward = found.backwards.at(block.born)
            block.column = "gradients" if died > backward.end else "temporaries"


def _column_between_phases(block: Block, died: int, phases: Spans) -> str:
    number = phases.begun(block.born)
    following = phases[number] if number < len(phases) else None
    if died <= (following.start if following else FOREVER - 1):
        return "temporaries"
    return "batch" if following and following.kind == "forward" else "unattributed"
