"""The ledger: which bytes were alive at which moment, and what each of them was for.

Plain data. A meter (`memlab.meters`) hands over three lists, and this file joins them:

- *events*: the allocator's own, one when a block of memory is handed out and one when it comes
  back;
- *observations*: "at this moment, this address held a parameter";
- *spans*: "from here to there a module ran forward", "... an operator ran", "... the optimizer
  stepped".

Nothing here imports torch, so every rule can be tested with a handful of made-up events.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

#: The columns of the ledger, in the order in which every table and figure shows them.
COLUMNS = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "batch",
    "temporaries",
    "unattributed",
)

#: The phases of a training step.
PHASES = ("forward", "backward", "optimizer", "other")

#: When one block was seen as several things, the first of these wins: a weight that autograd saved
#: is a parameter.
PRIORITY = {"parameters": 0, "optimizer_state": 1, "gradients": 2, "batch": 3, "activations": 4}

_FOREVER = 2**63 - 1


class Event(NamedTuple):
    """The allocator handed out `bytes` at `address` (positive), or took them back (negative). Time
    in nanoseconds.
    """

    time: int
    address: int
    bytes: int


class Observation(NamedTuple):
    """At `time`, the block at `address` was seen to be `column`; `name` says which (a parameter's
    name, say).
    """

    time: int
    address: int
    column: str
    name: str = ""


class Span(NamedTuple):
    """Something ran from `start` to `end` (nanoseconds).

    `kind` is `"module"`, `"operator"`, `"backward"` (autograd evaluating one node), `"optimizer"`
    or `"step"`. `sequence` is autograd's number of the forward operator, which its backward node
    carries too (-1: none). For a module it is 0 if it ran with gradients enabled, else -1.
    """

    start: int
    end: int
    kind: str
    name: str = ""
    thread: int = 0
    sequence: int = -1


@dataclass(slots=True)
class Block:
    """One allocation: its size, its life (nanoseconds; `died` is None if it outlived the record),
    what it was for.
    """

    bytes: int
    address: int
    born: int
    died: int | None = None
    column: str = "unattributed"
    phase: str = "other"
    module: str = ""
    operator: str = ""
    name: str = ""

    def __str__(self) -> str:
        where = self.module or self.name
        size = f"{self.bytes / 2**20:>10,.2f} MiB"
        return f"{size}  {self.column:<16}{self.operator:<34}{where}".rstrip()


@dataclass
class Timeline:
    """Bytes alive after each event: `seconds` since the start, `bytes[column]`, `total`, `phase`,
    all of one length.
    """

    seconds: np.ndarray
    bytes: dict[str, np.ndarray]
    total: np.ndarray
    phase: np.ndarray

    def thin(self, points: int = 1000) -> Timeline:
        """The same curve with at most about `points` moments, each the highest of its stretch: the
        peak stays.
        """
        count = len(self.total)
        if count <= points:
            return self
        edges = np.linspace(0, count, points + 1).astype(int)
        pairs = zip(edges[:-1], edges[1:], strict=True)
        keep = np.array([low + int(self.total[low:high].argmax()) for low, high in pairs])
        columns = {name: values[keep] for name, values in self.bytes.items()}
        return Timeline(self.seconds[keep], columns, self.total[keep], self.phase[keep])


@dataclass
class Ledger:
    """Every block that lived during a run, by column, with the phases of the run."""

    blocks: list[Block]
    phases: list[Span] = field(default_factory=list)
    start: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        changes = []  # (moment, signed bytes, which block)
        for index, block in enumerate(self.blocks):
            changes.append((block.born, block.bytes, index))
            if block.died is not None:
                changes.append((block.died, -block.bytes, index))
        changes.sort(key=lambda change: (change[0], change[1]))
        self._times = np.array([change[0] for change in changes], dtype=np.int64)
        self._changes = np.array([change[1] for change in changes], dtype=np.int64)
        self._owners = np.array([change[2] for change in changes], dtype=np.int64)
        self._total = np.cumsum(self._changes)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at once."""
        return int(self._total.max()) if len(self._total) else 0

    @property
    def peak_time(self) -> int:
        """The moment (nanoseconds) at which the peak was first reached."""
        return int(self._times[self._total.argmax()]) if len(self._total) else self.start

    @property
    def peak_phase(self) -> str:
        """The phase in which the peak was reached."""
        return self.phase_at(self.peak_time)

    def phase_at(self, time: int) -> str:
        """The phase at a moment (nanoseconds): forward, backward, optimizer or other."""
        return _phase_at(self.phases, [span.start for span in self.phases], time)

    def alive_at(self, time: int) -> list[Block]:
        """The blocks alive at a moment (nanoseconds), largest first."""
        alive = [b for b in self.blocks if b.born <= time and (b.died is None or b.died > time)]
        return sorted(alive, key=lambda block: -block.bytes)

    def columns_at(self, time: int) -> dict[str, int]:
        """Bytes by column at a moment (nanoseconds)."""
        columns = dict.fromkeys(COLUMNS, 0)
        for block in self.alive_at(time):
            columns[block.column] += block.bytes
        return columns

    def peak_columns(self) -> dict[str, int]:
        """Bytes by column at the peak; their sum is `peak_bytes`."""
        columns = dict.fromkeys(COLUMNS, 0)
        if len(self._total):
            last = int(self._total.argmax()) + 1
            for change, owner in zip(self._changes[:last], self._owners[:last], strict=True):
                columns[self.blocks[owner].column] += int(change)
        return columns

    def timeline(self) -> Timeline:
        """Bytes by column over time."""
        names = [block.column for block in self.blocks]
        of = np.array([COLUMNS.index(names[owner]) for owner in self._owners], dtype=np.int64)
        columns = {
            name: np.cumsum(np.where(of == number, self._changes, 0))
            for number, name in enumerate(COLUMNS)
        }
        starts = [span.start for span in self.phases]
        phase = np.array(
            [_phase_at(self.phases, starts, int(time)) for time in self._times], dtype=object
        )
        return Timeline((self._times - self.start) / 1e9, columns, self._total, phase)


def build_ledger(
    events: Iterable[Event],
    observations: Iterable[Observation] = (),
    spans: Iterable[Span] = (),
    alive: Sequence[Block] = (),
    *,
    start: int | None = None,
    end: int | None = None,
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

    Returns:
        The ledger, and the observations that fall on no block: memory that this allocator did not
        hand out.
    """
    spans = list(spans)
    blocks = lives(events, alive)
    times = [block.born for block in blocks] + [
        block.died for block in blocks if block.died is not None
    ]
    start = start if start is not None else min(times, default=0)
    end = end if end is not None else max(times, default=0)
    phases, backwards, recomputations = _phases(spans, start, end)
    _place(blocks, spans, phases)
    missed = _label(blocks, observations)
    _label_by_life(blocks, phases, backwards, recomputations, spans)
    return Ledger(blocks, phases, start, end), missed


def lives(events: Iterable[Event], alive: Sequence[Block] = ()) -> list[Block]:
    """The blocks of some events: every hand-out paired with its return."""
    blocks = list(alive)
    at: dict[int, Block] = {block.address: block for block in blocks}
    last = -_FOREVER
    for time, address, size in events:
        # The allocator's order is exact, its clock may be coarse: moments are kept apart so that no
        # two events share one.
        last = time = max(time, last + 1)
        known = at.pop(address, None)
        if size > 0:
            if known is not None and known.died is None:
                # The address is handed out again, so the old block has come back without a word
                # (another thread).
                known.died = time
            at[address] = block = Block(size, address, time)
            blocks.append(block)
        elif known is not None and known.died is None:
            known.died = time
        # A return of an address that was never handed out here is a block of before the run. It is
        # not ours to count.
    return blocks


def _phases(spans: list[Span], start: int, end: int) -> tuple[list[Span], list[Span], list[Span]]:
    """Turn raw spans into phases. Also given: the backwards whole, and the recomputations inside
    them.
    """
    steps = sorted(span for span in spans if span.kind == "step")
    nodes = _outermost(span for span in spans if span.kind == "backward")
    modules = _outermost(span for span in spans if span.kind == "module")
    operators = [span for span in spans if span.kind == "operator"]
    optimizers = []
    for span in _outermost(span for span in spans if span.kind == "optimizer"):
        optimizers += _own_work(span, nodes, modules, operators)

    in_node = _finder(nodes)
    forwards = [span for span in modules if not in_node(span.start)]
    nested = [span for span in optimizers if in_node(span.start)]
    optimizers = [span for span in optimizers if not in_node(span.start)]

    # Autograd evaluates node after node. The nodes between two other things make one backward. (A
    # module's end is one too: compiling a model evaluates nodes inside its first call.)
    breaks = sorted(
        [span.start for span in (*forwards, *optimizers, *steps)] + [span.end for span in forwards]
    )
    backwards: list[Span] = []
    for node in nodes:
        if backwards and bisect.bisect(breaks, backwards[-1].start) == bisect.bisect(
            breaks, node.start
        ):
            backwards[-1] = backwards[-1]._replace(end=node.end)
        else:
            backwards.append(Span(node.start, node.end, "backward"))

    # Forward runs from the first module call to the backward that follows it, loss included. With
    # no backward after it, it ends where the step does (or the module, where no step is known).
    # With no module at all, it begins where the step (or the last phase) did.
    step_at = _finder(steps)
    phases: list[Span] = []
    previous = start
    for span in sorted(optimizers + backwards) + [Span(end + 1, end + 1, "end")]:
        # (A module that calls backward itself goes on with its forward after that.)
        calls = [call for call in forwards if previous < call.end and call.start < span.start]
        alone = calls
        if span.kind == "backward":
            began = max((step.start for step in steps if step.start < span.start), default=start)
            # What ran in the step before (a validation, say) has nothing to do with this backward.
            alone, calls = [c for c in calls if c.end <= began], [c for c in calls if c.end > began]
        for call in alone:
            begin, step = max(previous, call.start), step_at(call.start)
            if not (phases and begin < phases[-1].end):  # else it goes on
                phases.append(
                    Span(begin, min(step.end if step else call.end, span.start), "forward")
                )
        if span.kind == "backward":
            phases.append(
                Span(max(previous, calls[0].start if calls else began), span.start, "forward")
            )
        phases.append(span)
        previous = span.end
    phases.pop()

    # An optimizer that steps inside the backward is a phase of its own for as long as it runs.
    cut: list[Span] = []
    nested.sort()
    begins = [inner.start for inner in nested]
    for span in phases:
        if span.kind == "backward":
            for inner in nested[
                bisect.bisect_left(begins, span.start) : bisect.bisect_left(begins, span.end)
            ]:
                cut += [span._replace(end=inner.start), inner]
                span = span._replace(start=inner.end)
        cut.append(span)
    phases = [span for span in cut if span.start < span.end]
    return phases, backwards, _recomputations(spans, nodes, backwards, modules, operators)


def _own_work(
    optimizer: Span, nodes: list[Span], modules: list[Span], operators: list[Span]
) -> list[Span]:
    """The parts of an optimizer's step that are its own: `optimizer.step(closure)` runs forward and
    backward inside.

    Optimizers compute without gradients, so an operator with a sequence number is the closure's
    forward.
    """
    inside = [node for node in nodes if optimizer.start <= node.start < optimizer.end]
    if not inside:
        return [optimizer]
    in_node = _finder(inside)
    closure = [
        span
        for span in (*modules, *(span for span in operators if span.sequence >= 0))
        if optimizer.start <= span.start < optimizer.end and not in_node(span.start)
    ]
    parts, begin, last = [], optimizer.start, optimizer.start
    for span in sorted(closure + inside):
        if span.kind != "backward" and begin is not None:
            parts.append(optimizer._replace(start=begin, end=span.start))
        begin = span.end if span.kind == "backward" else None
        last = max(last, span.end)
    parts.append(optimizer._replace(start=last))
    return [part for part in parts if part.start < part.end]


def _recomputations(
    spans: list[Span],
    nodes: list[Span],
    backwards: list[Span],
    modules: list[Span],
    operators: list[Span],
) -> list[Span]:
    """Where a forward runs again inside a node of a backward, as checkpointing does: at most one
    stretch a node.

    It is known by its modules, and by its operators: they run with gradients enabled, so autograd
    gives them sequence numbers, which the operators of a backward do not have. (All have them in a
    backward with `create_graph=True`.)
    """
    in_node, in_backward = _finder(nodes), _finder(backwards)
    of_nodes = {(span.name, span.sequence) for span in spans if span.kind == "backward"}
    found: dict[Span, tuple[int, int]] = {}
    begun: set[Span] = set()
    without_graph: set[Span] = set()
    candidates = []
    for span in sorted(operators, key=lambda span: (span.start, -span.end)):
        node = in_node(span.start)
        if node is None or (span.name, span.sequence) in of_nodes:
            continue
        if span.sequence >= 0:
            candidates.append((node, span))
        elif node not in begun:
            without_graph.add(in_backward(node.start))
        begun.add(node)
    computed = [
        (node, span) for node, span in candidates if in_backward(node.start) in without_graph
    ]
    computed += [(node, span) for span in modules if (node := in_node(span.start)) is not None]
    for node, span in computed:
        begin, end = found.get(node, (span.start, span.end))
        found[node] = min(begin, span.start), max(end, span.end)
    return sorted(Span(begin, end, "recomputation") for begin, end in found.values())


def _outermost(spans: Iterable[Span]) -> list[Span]:
    """The spans that lie in no other one of the list, in order of time."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def _finder(spans: list[Span]):
    """A function that says which of some ordered, disjoint spans holds a moment, or None."""
    starts = [span.start for span in spans]

    def find(time: int) -> Span | None:
        index = bisect.bisect_right(starts, time) - 1
        return spans[index] if index >= 0 and time < spans[index].end else None

    return find


def _phase_at(phases: list[Span], starts: list[int], time: int) -> str:
    index = bisect.bisect_right(starts, time) - 1
    return phases[index].kind if index >= 0 and time < phases[index].end else "other"


def _place(blocks: list[Block], spans: list[Span], phases: list[Span]) -> None:
    """Note for every block the phase, the operator and the module in which it was born."""
    starts = [span.start for span in phases]
    births = sorted(range(len(blocks)), key=lambda index: blocks[index].born)
    modules = sorted(
        (s for s in spans if s.kind == "module"), key=lambda span: (span.start, -span.end)
    )
    operators = sorted(
        (s for s in spans if s.kind in ("operator", "backward")),
        key=lambda span: (span.start, -span.end),
    )
    module_at = _innermost(modules)
    # A backward node carries the sequence number of the forward operator that made it: so it knows
    # its module.
    module_of = {}
    for span, name in zip(operators, module_at([span.start for span in operators]), strict=True):
        if (
            span.kind == "operator"
            and span.sequence >= 0
            and name is not None
            and span.sequence not in module_of
        ):
            module_of[span.sequence] = name.name
    times = [blocks[index].born for index in births]
    found_modules = module_at(times)
    found_operators = _innermost(operators)(times)
    found_nodes = _innermost([span for span in operators if span.kind == "backward"])(times)
    for index, module, operator, node in zip(
        births, found_modules, found_operators, found_nodes, strict=True
    ):
        block = blocks[index]
        block.phase = _phase_at(phases, starts, block.born)
        if operator is not None:
            block.operator = operator.name
        if module is not None:
            block.module = module.name
        elif node is not None:
            block.module = module_of.get(node.sequence, "")


def _innermost(spans: list[Span]):
    """A function that gives, for moments in order, the innermost of some nested spans that holds
    each (or None).
    """

    def find(times: list[int]) -> list[Span | None]:
        found, stack, position = [], [], 0
        for time in times:
            while position < len(spans) and spans[position].start <= time:
                while stack and stack[-1].end <= spans[position].start:
                    stack.pop()
                stack.append(spans[position])
                position += 1
            while stack and stack[-1].end <= time:
                stack.pop()
            found.append(stack[-1] if stack else None)
        return found

    return find


def _label(blocks: list[Block], observations: Iterable[Observation]) -> list[Observation]:
    """Give a block the column of what was seen in it. One look labels the block's whole life."""
    by_address: dict[int, list[Block]] = {}
    for block in blocks:
        by_address.setdefault(block.address, []).append(block)
    best: dict[int, int] = {}
    missed = []
    for seen in observations:
        block = _tenant(by_address.get(seen.address, ()), seen.time)
        if block is None:
            missed.append(seen)
            continue
        # What a module is given is the batch only if it was there before the model ran; else it is
        # an activation.
        if seen.column == "batch" and block.phase != "other":
            continue
        rank = PRIORITY[seen.column]
        if rank <= best.get(id(block), len(PRIORITY)):
            best[id(block)] = rank
            block.column = seen.column
            block.name = seen.name or block.name
    return missed


def _tenant(lives: Sequence[Block], time: int, slack: int = 50_000) -> Block | None:
    """Which of the blocks that lived at one address was there at a moment.

    The looker's clock and the allocator's differ by a microsecond or so; within `slack` nanoseconds
    of a life still counts, the nearest first.
    """
    nearest, distance = None, slack
    for block in lives:
        died = _FOREVER if block.died is None else block.died
        if block.born <= time < died:
            return block
        away = block.born - time if time < block.born else time - died
        if away < distance:
            nearest, distance = block, away
    return nearest


def _label_by_life(
    blocks: list[Block],
    phases: list[Span],
    backwards: list[Span],
    recomputations: list[Span],
    spans: list[Span],
) -> None:
    """Give every block that nobody saw a column by when it was born and when it came back.

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
    """
    starts = [span.start for span in phases]
    recomputing, backward_at = _finder(recomputations), _finder(backwards)
    with_graph = _finder(
        _outermost(span for span in spans if span.kind == "module" and span.sequence >= 0)
    )
    seen = set(PRIORITY)
    for block in blocks:
        if block.column in seen:
            continue
        died = _FOREVER if block.died is None else block.died
        index = bisect.bisect_right(starts, block.born) - 1
        current = phases[index] if index >= 0 and block.born < phases[index].end else None
        following = starts[index + 1] if index + 1 < len(phases) else _FOREVER - 1
        if current is None:
            given = index + 1 < len(phases) and phases[index + 1].kind == "forward"
            block.column = (
                "temporaries" if died <= following else "batch" if given else "unattributed"
            )
        elif current.kind == "forward":
            end, call = current.end, with_graph(block.born)
            if call is not None and (backward_at(end) is None):
                end = call.end
            block.column = "activations" if died > end else "temporaries"
        elif current.kind == "optimizer":
            block.column = "optimizer_state" if died > current.end else "temporaries"
        else:
            recomputation = recomputing(block.born)
            if recomputation is not None:
                block.column = "activations" if died > recomputation.end else "temporaries"
            else:
                # The backward as a whole, even where an optimizer that steps inside it cuts it in
                # pieces.
                block.column = "gradients" if died > backward_at(block.born).end else "temporaries"
