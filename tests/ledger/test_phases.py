"""Forward, backward and optimizer, from what ran when."""

from memlab.ledger import PHASES, Event, Span, build_ledger
from tests.ledger.made_up import TWO_STEPS, alive, columns_of


def test_the_phases_of_two_steps():
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=TWO_STEPS, start=0, end=2000)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        (kind, begin + low, begin + high)
        for begin in (0, 1000)
        for kind, low, high in (
            ("forward", 100, 300),
            ("backward", 300, 400),
            ("optimizer", 450, 500),
        )
    ]
    moments = (0, 99, 100, 250, 300, 342, 399, 400, 425, 450, 499, 500, 1100)
    assert [ledger.phase_at(moment) for moment in moments] == [
        "building",
        "other",
        "forward",
        "forward",
        "backward",
        "backward",
        "backward",
        "other",
        "other",
        "optimizer",
        "optimizer",
        "other",
        "forward",
    ]
    assert {span.kind for span in ledger.phases} | {"other", "building"} == set(PHASES)


def test_without_a_module_the_forward_begins_with_the_step():
    spans = [Span(100, 500, "step"), Span(300, 400, "backward", "A")]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=spans, start=0, end=600)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("forward", 100, 300),
        ("backward", 300, 400),
    ]


def test_without_a_backward_the_forward_ends_with_the_step_or_else_with_the_module():
    calls = [Span(100, 200, "module", "model"), Span(300, 350, "module", "head")]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=calls, end=900)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("forward", 100, 200),
        ("forward", 300, 350),
    ]
    again = [span._replace(start=span.start + 500, end=span.end + 500) for span in calls]
    steps = [Span(50, 450, "step"), Span(550, 890, "step")]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=[*calls, *again, *steps], end=900)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("forward", 100, 450),
        ("forward", 600, 890),
    ]


def test_gradient_accumulation_is_forward_and_backward_several_times():
    spans = [
        Span(0, 900, "step"),
        *(Span(b, b + 50, "module", "m") for b in (100, 300)),
        *(Span(b, b + 50, "backward", "A") for b in (200, 400)),
        Span(500, 600, "optimizer", "SGD"),
    ]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=spans, end=1000)
    assert [s.kind for s in ledger.phases] == [
        "forward",
        "backward",
        "forward",
        "backward",
        "optimizer",
    ]


def test_nodes_inside_a_module_are_not_one_backward_with_those_after_it():
    """`torch.compile` traces a backward inside the model's first call."""
    spans = [
        Span(100, 300, "module", "m"),
        Span(150, 160, "backward", "traced"),
        Span(400, 500, "backward", "A"),
    ]
    found = columns_of([alive(200, 1, 8, 450)], spans=spans)
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=spans, end=600)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("forward", 100, 150),
        ("backward", 150, 160),
        ("forward", 160, 400),
        ("backward", 400, 500),
    ]
    assert found == {1: "activations"}


def test_a_closure_runs_forward_and_backward_inside_the_optimizer():
    """LBFGS: the optimizer's own work lies before, between and after the evaluations of its
    closure.
    """
    spans = [Span(100, 1000, "optimizer", "LBFGS")]
    for begin in (200, 600):
        spans += [
            Span(begin, begin + 50, "module", "m"),
            Span(begin + 10, begin + 20, "operator", "aten::mm", sequence=1),
            Span(begin + 60, begin + 70, "operator", "aten::mean", sequence=2),
            Span(begin + 100, begin + 140, "backward", "A"),
            Span(begin + 150, begin + 200, "backward", "B"),
        ]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=spans, end=1100)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("optimizer", 100, 200),
        ("forward", 200, 300),
        ("backward", 300, 400),
        ("optimizer", 400, 600),
        ("forward", 600, 700),
        ("backward", 700, 800),
        ("optimizer", 800, 1000),
    ]


def test_an_optimizer_inside_the_backward_cuts_it_in_pieces():
    spans = [
        Span(100, 200, "module", "m"),
        Span(300, 350, "backward", "B"),
        Span(350, 450, "backward", "AccumulateGrad"),
        Span(400, 430, "optimizer", "SGD"),
        Span(450, 600, "backward", "A"),
        Span(500, 520, "optimizer", "SGD"),
    ]
    events = [
        alive(310, 1, 8, 590),  # dies inside the backward, though phases later
        alive(320, 2, 8, 700),  # a gradient that outlives the backward
        alive(410, 3, 8, 900),
        alive(410, 4, 8, 420),
    ]
    ledger, _ = build_ledger([Event(0, 9, 8)], spans=spans, end=1000)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("forward", 100, 300),
        ("backward", 300, 400),
        ("optimizer", 400, 430),
        ("backward", 430, 500),
        ("optimizer", 500, 520),
        ("backward", 520, 600),
    ]
    assert columns_of(events, spans=spans) == {
        1: "temporaries",
        2: "gradients",
        3: "optimizer_state",
        4: "temporaries",
    }


def test_thousands_of_optimizers_inside_a_backward():
    """One for each parameter, as the technique wants it: the phases are cut in time that grows with
    their number.
    """
    count = 20_000
    spans = [Span(0, 10 * count, "backward", "A")] + [
        Span(10 * i + 2, 10 * i + 5, "optimizer", "SGD") for i in range(count)
    ]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=spans)
    assert sum(span.kind == "optimizer" for span in ledger.phases) == count


def test_what_ran_again_in_backward_is_known_by_name():
    again = [Span(310, 330, "module", "model.inner"), Span(311, 320, "operator", "mm", 0, 7)]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=[*TWO_STEPS, *again], start=0, end=2000)
    assert ledger.modules == {"model", "model.inner"}
    assert ledger.recomputed == {"model.inner"} and ledger.recomputations == 1
    plain, _ = build_ledger([Event(0, 1, 8)], spans=TWO_STEPS, start=0, end=2000)
    assert not plain.recomputed and plain.recomputations == 0
