"""Where building ends: runs made by hand. A call is a letter; a list is a `.backward()` that passes
through some of them, a tuple an `autograd.grad`.
"""

import pytest

from memlab.ledger.building import without_building
from memlab.ledger.spans import Span, Spans


def run_of(*steps):
    """The spans of a run: (name, whether with gradients) a call, and the calls that a backward
    passes through, by their position in the step.
    """
    spans, ends, moment, number = [], [], 0, 0
    for step in steps:
        began, numbers = moment, []
        for part in step:
            if isinstance(part, str):
                graph = 0 if part.isupper() else -1
                spans.append(Span(moment, moment + 8, "module", part, sequence=graph))
                if not graph:
                    # The second operator makes no node: it has the number that comes next.
                    spans.append(Span(moment + 1, moment + 3, "operator", "mul", sequence=number))
                    number += 1
                    spans.append(Span(moment + 4, moment + 6, "operator", "eq", sequence=number))
                numbers.append(number - 1)
            else:
                for node in part:
                    spans.append(
                        Span(moment, moment + 1, "backward", "Mul", sequence=numbers[node])
                    )
                    moment += 2
                adds = "torch::autograd::AccumulateGrad"
                spans.append(Span(moment, moment + 2, "backward", adds))
                if isinstance(part, list):
                    spans.append(Span(moment, moment + 1, "operator", adds))
                moment += 2
            moment += 10
        ends.append(Span(began, moment, "step"))
    return Spans(spans), Spans(ends)


def begins(*steps):
    """At which call of the first step it begins."""
    spans, ends = run_of(*steps)
    first, *_ = without_building(spans, ends)
    moments = [span.start for span in spans.of("module") if span.start < first.end]
    return next(n for n, moment in enumerate(moments) if moment >= first.start)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([["M", [0]]], 0),
        ([["M", "M", [1]]], 1),  # tried out with gradients
        ([["m", "M", [1]], ["M", [0]]], 1),  # and without
        ([["m", "M", [1]]], 0),  # one step cannot tell that from a teacher
        ([["t", "M", [1]], ["t", "M", [1]]], 0),  # a teacher
        ([["M", "t", "M", [2]], ["t", "M", [1]]], 1),  # both
        ([["E", "D", [0, 1]]], 0),  # an encoder and a decoder
        ([["M", "M", [0, 1]]], 0),  # twins
        ([["M", [0], "M", [1]], ["M", [0]]], 0),  # micro-batches, of one number or another
        ([["M", "M"], ["M"]], 0),  # no backward: all of it may be the step
        ([["m", "M", [1]], ["m", "m", "m", "M", [3]]], 0),  # more beside it than there are
        ([["M", (0,), "M", (1,), "M", [2]]], 2),  # tried out with backwards of its own
        ([["M", (0,), "M", [1]], ["M", [0]]], 1),
        ([["M", (0,), "M", [1]], ["M", (0,), "M", [1]]], 0),  # each step attacks its batch first
        ([["M", (0,), [0]]], 0),  # the gradient's size is part of the loss
        ([["M", (0,), "M", (1,)], ["M", (0,), "M", (1,)]], 0),  # all are handed out
    ],
)
def test_the_first_step_begins_at_a_call_of_its_own(steps, expected):
    assert begins(*steps) == expected


def test_what_is_no_building_stays():
    spans, steps = run_of(["M", "M", [1]], ["M", "M", [1]])
    first, second = without_building(spans, steps)
    assert second == steps[1] and first.end == steps[0].end
    assert len(without_building(spans, Spans())) == 0


def test_operators_of_a_recomputation_count_as_no_call():
    """A checkpoint's operators run inside a node, and may have any number."""
    spans, steps = run_of(["M", "M", [1]])
    node = spans.of("backward")[0]
    again = Span(node.start, node.end, "operator", "mul", sequence=0)
    first, *_ = without_building(Spans([*spans, again]), steps)
    assert first.start == spans.of("module")[1].start
