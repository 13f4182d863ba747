"""What changed from one measurement to another, in one sentence."""

import pytest

from memlab.changes import change_in_words, went_elsewhere
from memlab.ledger import Block, Ledger, Span
from memlab.measurement import Measurement
from memlab.units import MiB

STEP = [Span(0, 10, "forward"), Span(10, 20, "backward")]


def made(*blocks, modules=(), recomputed=(), **more):
    """A measurement of these blocks, of which the step's backward begins at 10."""
    names = frozenset(modules)
    ledger = Ledger([*blocks], STEP, 0, 20, names, frozenset(recomputed), len(recomputed))
    columns = ledger.peak_columns()
    return Measurement(
        ledger.peak_bytes, columns, ledger.peak_phase, ledger, {"device": "cpu"}, **more
    )


def held(size, column, born=1, died=None, **more):
    return Block(size * MiB, 0, born, died, column, **more)


def scratch(size):
    return held(size, "temporaries", 12, 13, scratch=True)


WEIGHTS = held(100, "parameters")


def test_what_operators_take_is_told_from_temporaries():
    before = made(WEIGHTS, scratch(30), held(9, "gradients", 11), held(10, "activations", 2, 15))
    after = made(WEIGHTS, scratch(10), held(10, "activations", 2, 15))
    assert change_in_words(before, after) == (
        "Peak 149.00 MiB → 120.00 MiB (1.24× less): what operators take for themselves −20.00 MiB,"
        " gradients −9.00 MiB, activations when backward begins unchanged"
    )
    # What went the other way did not make the peak fall.
    after = made(WEIGHTS, scratch(3), held(12, "activations", 2, 15), held(9, "gradients", 11))
    assert change_in_words(before, after) == (
        "Peak 149.00 MiB → 124.00 MiB (1.20× less): what operators take for themselves −27.00 MiB,"
        " activations when backward begins +2.00 MiB"
    )


def test_the_activations_are_said_where_the_peak_does_not_show_them():
    at_work = held(50, "optimizer_state", 15)
    before = made(WEIGHTS, held(40, "activations", 2, 12), at_work)
    after = made(WEIGHTS, held(10, "activations", 2, 12), at_work)
    assert change_in_words(before, after) == (
        "Peak unchanged at 150.00 MiB: activations when backward begins −30.00 MiB"
    )
    # Where the column says it, once is enough.
    before, after = (made(WEIGHTS, held(size, "activations", 2, 12)) for size in (40, 10))
    assert change_in_words(before, after) == (
        "Peak 140.00 MiB → 110.00 MiB (1.27× less): activations −30.00 MiB"
    )


def test_what_moved_to_shared_memory_is_not_called_less():
    batch = held(50, "batch")
    elsewhere = {"outside_bytes": 40 * MiB, "outside_shared_bytes": 40 * MiB}
    here, moved = made(WEIGHTS, batch), made(WEIGHTS, **elsewhere)
    assert went_elsewhere(here, moved) and not went_elsewhere(moved, here)
    assert change_in_words(here, moved) == (
        "Peak 150.00 MiB → 100.00 MiB (150.00 MiB → 140.00 MiB with what is outside): batch"
        " −50.00 MiB, 40.00 MiB went to shared memory"
    )
    assert change_in_words(moved, here) == (
        "Peak 100.00 MiB → 150.00 MiB (1.50× more): batch +50.00 MiB, 40.00 MiB came back from"
        " shared memory"
    )


@pytest.mark.parametrize(
    "more, less, words",
    [
        # A file is read page by page: it may well be so many times less.
        ({"outside_bytes": 40 * MiB}, True, "40.00 MiB went to memory maps"),
        (
            {"outside_bytes": 40 * MiB, "outside_memory_bytes": 40 * MiB},
            False,
            "40.00 MiB went to NumPy's arrays or other threads",
        ),
        ({"outside_bytes": 1, "outside_memory_bytes": 1}, True, "batch −50.00 MiB"),
    ],
)
def test_what_moved_elsewhere_is_part_of_the_verdict(more, less, words):
    verdict = change_in_words(made(WEIGHTS, held(50, "batch")), made(WEIGHTS, **more))
    assert verdict.endswith(words)
    assert ("× less" in verdict) is less


MODULES = ("GPT", "h.0", "h.0.mlp", "h.1", "h.1.mlp", "norms.0", "head")


@pytest.mark.parametrize(
    "more, seen",
    [
        ({}, "Nothing was recomputed in backward."),
        ({"modules": MODULES}, "0 of 2 blocks were recomputed in backward."),
        (
            {"modules": MODULES, "recomputed": ("h.1.mlp", "norms.0")},
            "1 of 2 blocks were recomputed in backward.",
        ),
        (
            {"evaluating": True, "never_called": tuple("abcde")},
            (
                "Nothing was recomputed in backward, the model was in eval() mode, what was applied"
                " to a, b, c and 2 more was never called."
            ),
        ),
    ],
)
def test_where_nothing_changed_it_says_what_was_seen(more, seen):
    verdict = change_in_words(made(WEIGHTS), made(WEIGHTS, **more))
    assert verdict == f"Peak unchanged at 100.00 MiB, and every column. Is the switch on? {seen}"


def test_the_types_are_said_as_far_as_they_were_seen():
    def verdict(*dtypes):
        run = made(*(held(1, "activations", dtype=dtype) for dtype in dtypes))
        return change_in_words(run, run)

    assert "backward, the tensors seen were in FP32." in verdict(None, "int64", "float32")
    assert "seen were in BF16 and FP32." in verdict("float32", "bfloat16", "float32")
    assert "seen" not in verdict(None, "int64")


def test_scratch_alone_is_no_change():
    verdict = change_in_words(made(WEIGHTS, scratch(2)), made(WEIGHTS, scratch(1)))
    assert verdict == (
        "Peak 102.00 MiB → 101.00 MiB (1.01× less): what operators take for themselves −1.00 MiB,"
        " activations when backward begins unchanged, and the same tensors in every column. Is the"
        " switch on? Nothing was recomputed in backward."
    )
