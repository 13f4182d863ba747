"""Optimizer steps that were compiled."""

from memlab.ledger import Span
from memlab.meters.compiled import add_compiled_steps


def region(start, end, name="0/0"):
    return Span(start, end, "operator", f"Torch-Compiled Region: {name}")


def steps_of(spans, read):
    found = [span for span in add_compiled_steps(spans, read) if span.kind == "optimizer"]
    return [(span.start, span.end) for span in found]


def test_the_first_run_after_the_hook_was_read_is_a_step_and_all_of_its_name():
    spans = [region(5, 9, "3/0"), region(30, 40), region(60, 70), region(62, 64, "1/0")]
    assert steps_of(spans, [20, 25]) == [(20, 40), (60, 70)]
    assert steps_of(spans, []) == []
    assert steps_of(spans, [99]) == []


def test_a_hook_that_ran_after_all_means_that_nothing_was_compiled():
    hooked = Span(24, 28, "optimizer", "Adam")
    assert steps_of([hooked, region(30, 40)], [20]) == [(24, 28)]


def test_what_runs_forward_or_backward_is_more_than_a_step():
    for span in (Span(65, 66, "backward", "B"), Span(65, 66, "operator", "aten::mm", sequence=3)):
        assert steps_of([region(30, 40), region(60, 70), span], [20]) == [(20, 40)]
    tried = [
        Span(31, 35, "operator", "entire_frame_compile (dynamo_timed)"),
        Span(32, 33, "backward"),
    ]
    assert steps_of([region(30, 40), *tried], [20]) == [(20, 40)]


def test_modules_that_a_step_is_made_of_are_no_forward():
    module, other = Span(61, 69, "module", "<lambda>"), Span(80, 90, "module", "model")
    found = add_compiled_steps([region(30, 40), region(60, 70), module, other], [20])
    assert module not in found and other in found
