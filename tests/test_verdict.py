"""The verdict: one sentence of what the steps say."""

import dataclasses

from memlab.growth import Growth, growth_of, host_growth
from memlab.holders import Holder
from memlab.ledger import COLUMNS, Block, Ledger, Step
from memlab.units import MiB
from memlab.verdict import verdict_of, with_peak

HOLDER = Holder("list `losses` (4 entries) at train.py:3", "list", "losses.clear()")


def steps(peaks, left, shapes=None, column="kept", host=None):
    """Steps that were recorded in full; what grows is in one column."""
    found = []
    for number, (peak, after) in enumerate(zip(peaks, left, strict=True), 1):
        columns = dict.fromkeys(COLUMNS, 0) | {"parameters": left[0], column: after - left[0]}
        shape = () if shapes is None else ((shapes[number - 1], 16),)
        heap = None if host is None else host[number - 1]
        found.append(Step(number, 0, 1, shape, heap, peak, "forward", after, columns, after))
    return found


def test_a_steady_run():
    verdict = verdict_of(steps([90, 100, 100, 100], [50, 60, 60, 60]))
    assert (verdict.kind, verdict.bytes_a_step) == ("steady", 0)
    assert verdict.sentence == "Steady: from step 2 to step 4 nothing grows."


def test_a_creep_says_column_operator_module_and_holder():
    growth = [Growth("activations", "aten::linear", "head", MiB)]
    run = steps([9 * MiB] * 4, [5 * MiB, 6 * MiB, 7 * MiB, 8 * MiB])
    verdict = verdict_of(run, growth, holders=[HOLDER])
    assert (verdict.kind, verdict.column, verdict.bytes_a_step) == ("creep", "kept", MiB)
    assert (verdict.operator, verdict.module, verdict.holder) == (
        "aten::linear",
        "head",
        HOLDER.path,
    )
    assert verdict.sentence == (
        "It grows by 1.00 MiB a step (1,048,576 bytes): kept, activations made by aten::linear in"
        " head, held by list `losses` (4 entries) at train.py:3 (losses.clear())."
    )


def test_a_creep_of_gradients_and_state_needs_no_holder():
    verdict = verdict_of(
        steps([9 * MiB] * 4, [5 * MiB, 6 * MiB, 7 * MiB, 8 * MiB], None, "gradients")
    )
    assert (verdict.kind, verdict.column) == ("creep", "gradients")


def test_who_holds_it_may_not_be_known():
    run = steps([9 * MiB] * 4, [5 * MiB, 6 * MiB, 7 * MiB, 8 * MiB])
    assert verdict_of(run).sentence.endswith("The line that made it: --lines, or lines=True.")
    known = Growth("activations", "aten::add", "", MiB, line="train.py:26")
    assert verdict_of(run, [known]).sentence.endswith("Who holds it was not seen.")


def test_what_was_kept_once_is_no_creep():
    once = [5 * MiB, 5 * MiB, 5 * MiB, 7 * MiB, 7 * MiB, 7 * MiB + 2048, 7 * MiB]
    assert verdict_of(steps([9 * MiB] * 7, once)).kind != "creep"
    twice = [5 * MiB, 5 * MiB, 5 * MiB, 6 * MiB, 6 * MiB, 7 * MiB, 7 * MiB]
    assert verdict_of(steps([9 * MiB] * 7, twice)).kind == "creep"


def test_two_steps_cannot_tell_whether_it_goes_on():
    run = steps([9 * MiB] * 2, [5 * MiB, 6 * MiB])
    assert verdict_of(run).kind == "steady"  # a loop's variable
    assert "so far" in verdict_of(run).sentence
    verdict = verdict_of(run, [Growth("batch", "aten::randn", "", MiB)])
    assert verdict.kind == "creep"
    assert verdict.sentence.endswith("2 steps cannot tell whether that goes on: measure more.")


def test_a_loader_that_is_a_batch_ahead_is_no_creep():
    run = steps([9 * MiB] * 3, [5 * MiB, 5 * MiB, 6 * MiB], None, "batch")
    assert verdict_of(run, [Growth("batch", "aten::stack", "", MiB)]).kind == "steady"
    several = steps([9 * MiB] * 5, [5 * MiB, 6 * MiB, 7 * MiB, 8 * MiB, 9 * MiB], None, "batch")
    assert verdict_of(several).column == "batch"


def test_a_creep_that_ended():
    run = steps([9 * MiB] * 6, [MiB * size for size in (5, 6, 7, 8, 8, 8)])
    verdict = verdict_of(run)
    assert verdict.kind == "creep ended"
    assert verdict.sentence == "It grew by 2.00 MiB until step 4, and not after that."


def test_when_the_loops_function_returns_what_it_held_is_gone():
    run = steps([9 * MiB] * 6, [MiB * size for size in (5, 6, 7, 8, 9, 0)])
    assert (verdict_of(run).kind, verdict_of(run).bytes_a_step) == ("creep", MiB)
    ended = verdict_of(steps([9 * MiB] * 7, [MiB * size for size in (5, 6, 7, 8, 8, 8, 0)]))
    assert ended.sentence == "It grew by 2.00 MiB until step 4, and not after that."


def test_a_creep_in_some_steps_only_is_said_on_average():
    """A new optimizer every third step, say, while the old ones are held."""
    run = steps([9 * MiB] * 11, [MiB * size for size in (5, 6, 6, 6, 9, 9, 9, 12, 12, 12, 15)])
    verdict = verdict_of(run)
    assert (verdict.kind, verdict.bytes_a_step) == ("creep", MiB)
    assert "a step on average" in verdict.sentence


def test_a_creep_of_the_host_alone():
    cheap = [Step(number, 0, 1, (), 10**6 + 40_000 * number) for number in range(3, 20)]
    verdict = verdict_of([*steps([90, 100], [50, 50], host=[0, 10**6]), *cheap], holders=[HOLDER])
    assert verdict.kind == "steady"
    assert verdict.sentence.startswith(
        "Steady on the device, and the host's heap grows by 39.06 KiB"
    )
    assert "held by list `losses`" in verdict.sentence


def test_what_comes_and_goes_is_no_creep():
    run = steps([9 * MiB] * 6, [MiB * size for size in (5, 6, 5, 7, 6, 6)])
    assert verdict_of(run).kind == "steady"


def test_what_falls_between_two_steps_that_were_recorded_counts_whole():
    run = steps([9 * MiB] * 7, [MiB * size for size in (5, 5, 6, 5, 6, 5, 6)])
    numbers = (1, 2, 3, 16, 17, 32, 33)
    run = [dataclasses.replace(s, number=n) for s, n in zip(run, numbers, strict=True)]
    assert verdict_of(run).kind == "steady"


def test_after_the_last_step_a_loops_variables_may_be_gone():
    run = steps([9 * MiB] * 5, [MiB * size for size in (5, 6, 7, 8, 8)])
    assert verdict_of(run).kind == "creep"


def test_the_longest_batch_holds_the_peak():
    run = steps([90, 100, 300, 200, 100, 300], [50] * 6, [4, 4, 32, 4, 4, 32])
    verdict = verdict_of(run)
    assert verdict.kind == "longest batch"
    assert verdict.sentence == (
        "The longest batch holds the peak: shape (32, 16), steps 3, 6; the other steps need 100 B."
    )


def test_the_usual_batch_is_not_the_longest():
    assert verdict_of(steps([90, 300, 300, 100], [50] * 4, [4, 32, 32, 4])).kind == "steady"


def test_the_peak_of_building():
    verdict = verdict_of(steps([90, 100], [50, 50]), building_peak=400)
    assert verdict.kind == "building"
    assert "400 B, is that of building; the steps need 100 B" in verdict.sentence
    assert verdict_of(steps([90, 100], [50, 50]), building_peak=80).kind == "steady"


def test_one_step_alone_says_nothing():
    assert verdict_of(steps([90], [50])).kind == "unknown"
    assert verdict_of([]).kind == "unknown"
    assert verdict_of(steps([90], [50]), building_peak=400).kind == "building"


def test_the_line_that_grows_is_marked():
    growth = [Growth("activations", "aten::linear", "head", MiB, (), "train.py:12")]
    run = steps([9 * MiB] * 4, [5 * MiB, 6 * MiB, 7 * MiB, 8 * MiB])
    verdict = verdict_of(run, growth)
    assert verdict.line == "train.py:12"
    assert "kept, activations made by aten::linear in head at train.py:12." in verdict.sentence


def test_a_peak_outside_all_steps_is_said():
    run = [
        dataclasses.replace(step, start=10 * step.number, end=10 * step.number + 9)
        for step in steps([90, 100, 100], [50, 60, 60])
    ]
    verdict = verdict_of(run)

    def more(peak_bytes, moment):
        return with_peak(verdict, run, peak_bytes, moment).sentence.removeprefix(verdict.sentence)

    assert more(100, 5) == ""
    assert more(300, 15) == ""  # a GPU's counter knows more than the steps do
    assert more(300, 5) == " The peak, 300 B, came before the first step."
    assert more(300, 50).startswith(" The peak, 300 B, came after step 3, in a step that did not")


def test_a_peak_of_the_first_step_alone_is_said():
    def said(peaks):
        run = steps(peaks, [5 * MiB] * len(peaks))
        return with_peak(verdict_of(run), run, max(peaks), 0).sentence

    assert said([9 * MiB, 7 * MiB, 8 * MiB]).endswith(
        " The peak is that of step 1 alone; the others need 8.00 MiB."
    )
    assert "alone" not in said([8 * MiB, 8 * MiB, 7 * MiB])
    assert "alone" not in said([9 * MiB, 8 * MiB])  # one other step says too little
