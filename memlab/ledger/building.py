"""Where a run that builds as it goes, a generator, ends building and begins its first step."""

from __future__ import annotations

from itertools import groupby

from memlab.ledger.spans import Span, Spans

#: What adds to a parameter's gradient. `torch.autograd.grad`, which hands gradients out, runs none.
_ADDS = "torch::autograd::AccumulateGrad"


def without_building(spans: Spans, steps: Spans) -> Spans:
    """Cut what still builds off the first step: a model that is called to try it out, say.

    A backward tells which calls its forward had: autograd gives a node the number of the operator
    that made it. So the step begins at the first call that a backward of it passes through. Calls
    before that one may be part of the step, too, such as a teacher's, which runs without gradients:
    as many as the second step has, or, without a second step, all that ran without gradients.

    A backward that hands its gradients out is a trial, if there are others in the step that leave
    theirs with the parameters.

    Args:
        spans: everything that ran.
        steps: the run's steps, the first from the first call of a module, or from before it.

    Returns:
        The steps. The first begins later, if calls before it are none of its own.
    """
    if not steps:
        return steps
    first, *others = steps
    calls, trained = _calls(spans, first)
    if trained is None:
        return steps  # inference, or no module's call leads to the backward

    begin = trained
    if others:
        _, beside = _calls(spans, others[0])
        begin = max(0, trained - (beside or 0))
    else:
        while begin > 0 and calls[begin - 1].sequence < 0:
            begin -= 1
    moment = max(first.start, calls[begin].start) if begin else first.start
    return Spans([first._replace(start=moment), *others])


def _calls(spans: Spans, step: Span) -> tuple[list[Span], int | None]:
    """A step's outermost calls, and which is the first that a backward of the step passes through
    (None: it passes through none).
    """
    inside = Spans(spans.inside(step))
    nodes = inside.of("backward").outermost()
    calls = [call for call in inside.of("module").outermost() if not nodes.at(call.start)]
    of_nodes = {node.sequence for node in _that_train(nodes, calls, inside)} - {-1}

    # An operator that makes no node has the number of the next node: the last to have it made it.
    made = {
        span.sequence: span
        for span in inside.of("operator")
        if span.sequence in of_nodes and not nodes.at(span.start)
    }
    for number, call in enumerate(calls):
        # (A checkpoint may be one operator with the whole call inside.)
        if any(
            call.start <= operator.start < call.end or operator.start <= call.start < operator.end
            for operator in made.values()
        ):
            return calls, number
    return calls, None


def _that_train(nodes: Spans, calls: list[Span], inside: Spans) -> list[Span]:
    """The nodes of the backwards that add to gradients; of all, where none does."""
    added = [span.start for span in inside.of("operator") if span.name == _ADDS]
    begun = Spans(calls)
    found: list[Span] = []
    # The nodes between two calls are those of one backward, or of several of the same calls.
    for _, of_backward in groupby(nodes, lambda node: begun.begun(node.start)):
        backward = list(of_backward)
        if any(backward[0].start <= moment < backward[-1].end for moment in added):
            found += backward
    return found or list(nodes)
