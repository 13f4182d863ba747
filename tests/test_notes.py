"""What is said below a measurement's columns."""

from memlab.notes import notes_on_outside, notes_on_steps
from memlab.units import KiB
from tests.test_growth import steps_that_leave
from tests.test_verdict import steps


def test_what_lies_outside():
    assert notes_on_outside(0, 0) == []
    [note] = notes_on_outside(8 * KiB, 0)
    assert note.startswith("not counted: 8.00 KiB of tensors") and note.endswith("the run)")
    assert notes_on_outside(8 * KiB, 6 * KiB) == [note + "; NumPy's arrays: 6.00 KiB"]


def test_what_was_not_recorded_and_what_the_host_keeps():
    assert notes_on_steps(steps([90, 100], [50, 50]), "steady") == []
    run = steps_that_leave(40_000)
    [recorded] = notes_on_steps(run, "steady")  # the verdict says the rest
    assert recorded.startswith("recorded in full: 2 of 19 steps, and the peak is that of these")
    assert "every=1" in recorded
    assert notes_on_steps(run, "creep")[1:] == ["host: 39.06 KiB more on the heap after each step"]


def test_where_every_step_is_recorded_the_heap_is_not_judged():
    [note] = notes_on_steps(steps([90] * 9, [50] * 9), "steady")
    assert note.startswith("the host's heap is not judged")
