"""The steps of a run, drawn."""

import pytest

from memlab import figures
from memlab.ledger import COLUMNS, Ledger, Step
from memlab.measurement import Measurement
from memlab.units import MiB


def measurement(steps):
    columns = dict.fromkeys(COLUMNS, 0)
    return Measurement(9 * MiB, columns, "forward", Ledger([]), {}, steps=tuple(steps))


def step(number, peak, left):
    columns = dict.fromkeys(COLUMNS, 0) | {"kept": left}
    return Step(number, 0, 1, ((4, 8),), None, peak, "forward", left, columns, left)


def test_peaks_and_what_is_left_are_drawn_where_they_were_recorded():
    grown = measurement([step(1, 5 * MiB, MiB), Step(2, 0, 1), step(3, 9 * MiB, 4 * MiB)])
    figure = figures.steps(grown, "Title")
    peaks, left = figure.axes[0].lines
    assert peaks.get_xdata().tolist() == left.get_xdata().tolist() == [1, 3]
    assert peaks.get_ydata().tolist() == [5, 9]
    assert left.get_ydata().tolist() == [1, 4]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("step", "MiB")
    assert "the last one at 9.00 MiB and leaves 4.00" in figure.alt


def test_the_title_is_the_verdict():
    steady = measurement([step(number, 5 * MiB, MiB) for number in (1, 2, 3)])
    assert figures.steps(steady).get_suptitle().startswith("Steady: from step 2 to step 3")


def test_without_a_recorded_step_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="no step was recorded in full"):
        figures.steps(measurement([Step(1, 0, 1)]))
