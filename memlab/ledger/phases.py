"""A run's phases, forward, backward and optimizer, from what ran when."""

from __future__ import annotations

from typing import NamedTuple

from memlab.ledger.spans import Span, Spans

#: The phases of a training step, and what came before the first one.
PHASES = ("forward", "backward", "optimizer", "building", "other")


class Phases(NamedTuple):
    """The phases of a run, the backwards whole (an optimizer that steps inside one cuts the phase
    in pieces), where a forward ran again inside a backward, and which modules did.
    """

    phases: Spans
    backwards: Spans
    recomputations: Spans
    recomputed: frozenset[str]


def find_phases(spans: Spans, start: int, end: int) -> Phases:
    """Turn what ran into phases.

    Args:
        spans: everything that ran.
        start, end: the first and last moment of the run (nanoseconds).
    """
    nodes = spans.of("backward").outermost()
    modules = spans.of("module").outermost()
    operators = spans.of("operator")
    steps = spans.of("step")
    optimizers = []
    for span in spans.of("optimizer").outermost():
        optimizers += _work_of_its_own(span, nodes, modules, operators)

    forwards = Spans(span for span in modules if not nodes.at(span.start))
    nested = Spans(span for span in optimizers if nodes.at(span.start))
    optimizers = [span for span in optimizers if not nodes.at(span.start)]

    backwards = _join(nodes, forwards, optimizers, steps)
    phases = _with_forwards(Spans([*optimizers, *backwards]), forwards, steps, start, end)
    phases = _cut(phases, nested)
    recomputations = _recomputations(nodes, backwards, modules, operators, spans)
    again = (span.name for span in spans.of("module") if nodes.at(span.start))
    return Phases(phases, backwards, recomputations, frozenset(again))


def _work_of_its_own(optimizer: Span, nodes: Spans, modules: Spans, operators: Spans) -> list[Span]:
    """An optimizer's step without what is not its own: `optimizer.step(closure)` runs forward and
    backward inside.

    Optimizers compute without gradients, so an operator with a sequence number is the closure's
    forward.
    """
    inside = Spans(nodes.inside(optimizer))
    if not inside:
        return [optimizer]
    with_gradients = [span for span in operators.inside(optimizer) if span.sequence >= 0]
    calls = [*modules.inside(optimizer), *with_gradients]
    closure = [span for span in calls if not inside.at(span.start)]

    stretches = []
    begin: int | None = optimizer.start
    last = optimizer.start
    for span in Spans([*closure, *inside]):
        if span.kind == "backward":
            begin = span.end
        elif begin is not None:
            stretches.append(optimizer._replace(start=begin, end=span.start))
            begin = None
        last = max(last, span.end)
    stretches.append(optimizer._replace(start=last))
    return [stretch for stretch in stretches if stretch.start < stretch.end]


def _join(nodes: Spans, forwards: Spans, optimizers: list[Span], steps: Spans) -> Spans:
    """Autograd evaluates node after node. The nodes between two other things make one backward."""
    # (A module's end is one, too: compiling a model evaluates nodes inside its first call.)
    moments = [span.start for span in (*forwards, *optimizers, *steps)]
    moments += [span.end for span in forwards]
    breaks = Spans(Span(moment, moment, "break") for moment in moments)

    backwards: list[Span] = []
    for node in nodes:
        previous = backwards[-1] if backwards else None
        if previous and breaks.begun(previous.start) == breaks.begun(node.start):
            backwards[-1] = previous._replace(end=node.end)
        else:
            backwards.append(Span(node.start, node.end, "backward"))
    return Spans(backwards)


def _with_forwards(others: Spans, forwards: Spans, steps: Spans, start: int, end: int) -> Spans:
    """The backwards and the optimizers, with the forwards between them.

    Forward runs from the first module call to the backward that follows it, loss included. With no
    backward after it, it ends where the step does (or the module, where no step is known). With no
    module at all, it begins where the step (or the last phase) did.
    """
    phases: list[Span] = []
    previous = start
    for span in (*others, Span(end + 1, end + 1, "end")):
        # (A module that calls backward itself goes on with its forward after that.)
        calls = [call for call in forwards if previous < call.end and call.start < span.start]
        without_backward = calls
        if span.kind == "backward":
            began = max((step.start for step in steps if step.start < span.start), default=start)
            # What ran in the step before (a validation, say) has nothing to do with this backward.
            without_backward = [call for call in calls if call.end <= began]
            calls = [call for call in calls if call.end > began]
        for call in without_backward:
            begin = max(previous, call.start)
            step = steps.at(call.start)
            goes_on = phases and begin < phases[-1].end
            if not goes_on:
                until = step.end if step else call.end
                phases.append(Span(begin, min(until, span.start), "forward"))
        if span.kind == "backward":
            begin = max(previous, calls[0].start if calls else began)
            phases.append(Span(begin, span.start, "forward"))
        phases.append(span)
        previous = span.end
    return Spans(phases[:-1])


def _cut(phases: Spans, nested: Spans) -> Spans:
    """An optimizer that steps inside the backward is a phase of its own for as long as it runs."""
    cut: list[Span] = []
    for span in phases:
        rest = span
        if span.kind == "backward":
            for optimizer in nested.inside(span):
                cut += [rest._replace(end=optimizer.start), optimizer]
                rest = rest._replace(start=optimizer.end)
        cut.append(rest)
    return Spans(span for span in cut if span.start < span.end)


def _recomputations(
    nodes: Spans, backwards: Spans, modules: Spans, operators: Spans, spans: Spans
) -> Spans:
    """Where a forward runs again inside a node of a backward, as checkpointing does: at most one
    stretch a node.

    It is known by its modules, and by its operators: they run with gradients enabled, so autograd
    gives them sequence numbers, which the operators of a backward do not have. (All have them in a
    backward with `create_graph=True`.)
    """
    of_nodes = {(span.name, span.sequence) for span in spans if span.kind == "backward"}
    begun: set[Span] = set()
    without_graph: set[Span | None] = set()
    candidates: list[tuple[Span, Span]] = []
    for span in operators:
        node = nodes.at(span.start)
        if node is None or (span.name, span.sequence) in of_nodes:
            continue
        if span.sequence >= 0:
            candidates.append((node, span))
        elif node not in begun:
            without_graph.add(backwards.at(node.start))
        begun.add(node)

    computed = [
        (node, span) for node, span in candidates if backwards.at(node.start) in without_graph
    ]
    computed += [(node, span) for span in modules if (node := nodes.at(span.start)) is not None]

    found: dict[Span, Span] = {}
    for node, span in computed:
        known = found.get(node, span)
        begin, end = min(known.start, span.start), max(known.end, span.end)
        found[node] = Span(begin, end, "recomputation")
    return Spans(found.values())
