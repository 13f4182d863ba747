"""Bars: what they add up to, and where predictions and a budget stand."""

import pytest

from memlab.figures import bars, drawing
from memlab.figures.bars import bars_in_words
from memlab.ledger import COLUMNS
from memlab.units import GiB, MiB
from tests.figures.reading import EVERYTHING, check_bars, ledger, letters, marks, rows

TWO = {
    "one": ledger(parameters=30 * MiB, activations=70 * MiB),
    "two, with a name that is too long for a line": ledger(parameters=50 * MiB),
}


def drawn(*args, **options):
    axes = drawing(3).subplots()
    bars(axes, *args, **options)
    return axes


def test_bars_add_up_to_the_ledgers_totals():
    ledgers = TWO | {"everything": EVERYTHING, "nothing": ledger()}
    axes = drawn(ledgers)
    check_bars(axes, ledgers.values(), MiB)
    assert rows(axes) == list(ledgers)
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first on top
    assert axes.get_xlabel() == "MiB at the peak"
    assert axes.get_xlim() == pytest.approx((0, 1.16 * 100 * len(COLUMNS)))


def test_predictions_and_the_budget_stand_where_they_belong():
    axes = drawn(TWO, {"one": 110 * MiB, "of another figure": GiB}, limit=60 * MiB)
    [(at, row)] = marks(axes, "^")
    assert at == pytest.approx(110)
    assert 0.31 < row < 0.5  # below the first bar, above the second
    [line] = [line for line in axes.lines if line.get_marker() == "None"]
    assert line.get_xdata() == pytest.approx([60, 60])
    assert "budget 60.00 MiB" in letters(axes)
    # The axis ends a little beyond the largest: here the prediction.
    assert axes.get_xlim()[1] == pytest.approx(1.16 * 110)


@pytest.mark.parametrize("predicted", [None, {}, {"one": None}])
def test_without_predictions_and_budget_nothing_is_marked(predicted):
    assert len(drawn(TWO, predicted).lines) == 0


def test_the_alternative_text_says_all_that_the_bars_show():
    ledgers = {"one": TWO["one"], "two": ledger(optimizer_state=50 * MiB)}
    assert bars_in_words("Title", ledgers, {"one": 110 * MiB, "two": None}, 60 * MiB) == (
        "Title. one: 100.00 MiB, predicted 110.00 MiB (parameters 30.00 MiB, activations 70.00"
        " MiB). two: 50.00 MiB (optimizer state 50.00 MiB). The budget is 60.00 MiB."
    )
    assert bars_in_words("Title", {"two": ledgers["two"]}) == (
        "Title. two: 50.00 MiB (optimizer state 50.00 MiB)."
    )
