"""Whole figures: what stands on which axes, and that all of it can be read."""

import numpy as np
import pytest

from memlab import figures
from memlab.units import GiB, MiB, format_bytes
from tests.figures.reading import (
    EVERYTHING,
    LONG_TITLE,
    check_bars,
    check_readable,
    check_stack,
    in_legend,
    ledger,
    letters,
    marks,
    of_length,
    rows,
    title,
    words,
)

# Ledgers ------------------------------------------------------------------------------------------


LEDGERS = {
    "nothing in a ledger": ({"nothing": ledger(), "something": ledger(parameters=5 * MiB)}, {}),
    "one bar": (
        {"as it is": ledger(parameters=300 * MiB, unattributed=200 * MiB)},
        {"limit": 400 * MiB},
    ),
    "everything": (
        {"all": EVERYTHING, "small": {c: size // 10 for c, size in EVERYTHING.items()}},
        {"predicted": {"all": 650 * MiB, "small": 70 * MiB}},
    ),
    "very small bars": (
        {
            "large": ledger(parameters=GiB, activations=14 * GiB),
            "small": ledger(parameters=3 * MiB, unattributed=MiB),
        },
        {"predicted": {"small": 4 * MiB}},
    ),
    "long names": (
        {
            "FP32, naive attention, AdamW with foreach, nothing recomputed": ledger(
                activations=12 * GiB, batch=GiB
            ),
            "x" * 60: ledger(activations=6 * GiB, temporaries=GiB),
        },
        {},
    ),
    "six bars": (
        {f"number {i}": ledger(parameters=20 * MiB, activations=i * 30 * MiB) for i in range(1, 7)},
        {},
    ),
    "bytes": ({"large": ledger(parameters=900), "small": ledger(activations=9)}, {}),
    "a budget at the left": ({"one": ledger(activations=90 * MiB)}, {"limit": MiB}),
    "a budget at the right": ({"one": ledger(activations=90 * MiB)}, {"limit": 90 * MiB + 1}),
    "a budget beyond the bars": ({"one": ledger(activations=9 * MiB)}, {"limit": 90 * MiB}),
}


@pytest.mark.parametrize("case", LEDGERS)
@pytest.mark.parametrize("what_happened", ["Short", LONG_TITLE], ids=["short", "long"])
def test_ledgers_can_be_read(case, what_happened):
    columns, options = LEDGERS[case]
    figure = figures.ledgers(columns, what_happened, **options)
    largest = max([sum(held.values()) for held in columns.values()] + [options.get("limit", 0)])
    unit, unit_name = figures.unit_for(largest)
    check_bars(figure.axes[0], columns.values(), unit)
    assert figure.axes[0].get_xlabel() == f"{unit_name} at the peak"
    check_readable(figure)
    assert title(figure) == what_happened
    assert figure.alt.startswith(f"{what_happened}. {next(iter(columns))}: ")
    assert ("The budget is " in figure.alt) == ("limit" in options)
    assert ("predicted peak" in in_legend(figure)) == ("predicted" in options)


# Ladders ------------------------------------------------------------------------------------------

LADDER = {  # in MiB: an eighth of the first is 100
    "as it is": ledger(parameters=200 * MiB, activations=600 * MiB),
    "in BF16": ledger(parameters=200 * MiB, activations=300 * MiB),
    "recomputed": ledger(parameters=70 * MiB, activations=30 * MiB),
    "8-bit state": ledger(parameters=40 * MiB, optimizer_state=10 * MiB, unattributed=10 * MiB),
    "streamed, with a name that is too long for a line": ledger(parameters=5 * MiB),
}


def test_the_small_rungs_of_a_ladder_are_drawn_once_more():
    figure = figures.ladder(LADDER, "Peak 800.00 MiB → 5.00 MiB")
    all_of_them, enlarged = figure.axes
    check_bars(all_of_them, LADDER.values(), MiB)
    check_bars(enlarged, list(LADDER.values())[2:], MiB)  # an eighth itself is small
    assert rows(enlarged) == list(LADDER)[2:]
    # MiB: the axis ends a little beyond the largest of them.
    assert enlarged.get_xlim()[1] == pytest.approx(116)
    assert "The last 3 of them, enlarged" in {text for text, _, _ in words(figure)}
    assert title(figure) == "Peak 800.00 MiB → 5.00 MiB"
    # What is small in the whole is in the legend if it is half a percent of it.
    assert in_legend(figure) == ["parameters", "optimizer state", "activations", "unattributed"]
    # The alternative text names every rung once.
    assert [figure.alt.count(f"{name}: ") for name in LADDER] == [1] * len(LADDER)
    check_readable(figure)


def test_the_predictions_of_a_ladder_stand_in_both_parts():
    predicted = {"as it is": None, "in BF16": 510 * MiB, "8-bit state": 61 * MiB}
    figure = figures.ladder(LADDER, "Title", predicted)
    found = [[(at, int(row)) for at, row in marks(axes, "^")] for axes in figure.axes]
    assert found == [[(510, 1), (61, 3)], [(61, 1)]]
    assert "predicted peak" in in_legend(figure)
    assert figure.alt.count("predicted") == 2 and "500.00 MiB, predicted 510.00 MiB" in figure.alt
    check_readable(figure)


@pytest.mark.parametrize("predicted", [None, {}, {"in BF16": None}])
def test_a_ladder_without_predictions(predicted):
    figure = figures.ladder(LADDER, "Title", predicted)
    assert [marks(axes, "^") for axes in figure.axes] == [[], []]
    assert "predicted peak" not in in_legend(figure) and "predicted" not in figure.alt


@pytest.mark.parametrize(
    "totals, small",
    [
        ([800, 101, 100, 60], 2),
        ([800, 50, 600, 90, 40], 2),  # the one above a larger one is not enlarged
        ([90, 800, 90, 90], 2),
        ([800, 600, 90], 0),  # one alone shows no difference
        ([800, 90, 600], 0),
        ([800, 700, 600], 0),
        ([800], 0),
        ([0, 0, 0], 0),
    ],
)
def test_which_rungs_of_a_ladder_are_enlarged(totals, small):
    rungs = {f"rung {i}": ledger(parameters=total * MiB) for i, total in enumerate(totals)}
    figure = figures.ladder(rungs, "Title")
    shown = [list(rungs), list(rungs)[-small:]] if small else [list(rungs)]
    assert [rows(axes) for axes in figure.axes] == shown
    check_readable(figure)


def test_a_long_title_of_a_ladder_has_room():
    figure = figures.ladder(LADDER, LONG_TITLE)
    assert title(figure) == LONG_TITLE
    assert figure.get_size_inches()[1] > figures.ladder(LADDER, "Short").get_size_inches()[1]
    check_readable(figure)


# Comparisons --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["plain"],
        ["plain", "a checkpoint a block"],
        ["plain", "b", "a name that is too long for a line beside two others"],
        ["plain", "b", "c", "d", "e"],
    ],
    ids=len,
)
def test_a_comparison(names):
    measurements = {name: of_length(1 / number) for number, name in enumerate(names, 1)}
    # The first has none, unless it is alone.
    predicted = {name: run.peak_bytes + 1000 for name, run in measurements.items()}
    if len(names) > 1:
        predicted[names[0]] = None
    figure = figures.comparison(measurements, "Less", predicted)

    above, *below = figure.axes
    check_bars(above, [run.columns for run in measurements.values()], MiB)
    expected = [(row, predicted[name]) for row, name in enumerate(names) if predicted[name]]
    found = [(int(row), at * MiB) for at, row in marks(above, "^")]
    assert found == [(row, pytest.approx(size)) for row, size in expected]

    # Up to three timelines; of more, the first and the last. All on one axis.
    shown = names if len(names) <= 3 else [names[0], names[-1]]
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in below]
    assert titles == shown
    for axes, name in zip(below, shown, strict=True):
        check_stack(axes, measurements[name], MiB)
        assert axes.get_ylim() == below[0].get_ylim()
        assert len([text for text in letters(axes) if text]) >= 2

    assert title(figure) == "Less" and figure.alt.startswith("Less. plain: ")
    for name in names:
        beside = f", predicted {format_bytes(predicted[name])}" if predicted[name] else ""
        assert f"{name}: {format_bytes(measurements[name].peak_bytes)}{beside} (" in figure.alt
    width, height = figure.get_size_inches()
    assert width == 7.2 and height <= 6
    assert in_legend(figure)[-1] == "predicted peak"
    check_readable(figure)


@pytest.mark.parametrize("predicted", [None, {}, {"before": None}])
def test_a_comparison_without_predictions(predicted):
    measurements = {"before": of_length(1), "after": of_length(2)}
    figure = figures.comparison(measurements, "The same", predicted)
    assert marks(figure.axes[0], "^") == []
    assert "predicted peak" not in in_legend(figure) and "predicted" not in figure.alt


@pytest.mark.parametrize("seconds", [4e-5, 1.9, 4000])
def test_side_by_side_the_name_of_a_phase_that_does_not_fit_is_left_out(seconds):
    measurements = {
        "1": of_length(seconds / 3),
        "2": of_length(seconds),
        "3": of_length(seconds / 7, (1, 1, 1, 1, 1, 30)),
    }
    figure = figures.comparison(measurements, "Title")
    assert letters(figure.axes[2]) == ["forward", "bwd", "", "fwd", "backward", ""]
    assert letters(figure.axes[3]) == ["", "", "", "", "", "optimizer"]
    check_readable(figure)


# Curves -------------------------------------------------------------------------------------------


def test_curves():
    lines = {"measured": ([1, 2, 4], [50.0, 30.0, 20.0]), "predicted": ([1, 2, 4], [48, 31, 21])}
    bands = {"measured": ([49, 29, 19], [51, 31, 21])}
    figure = figures.curves(lines, "Fewer", "segments", "peak, MiB", bands)
    [axes] = figure.axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert drawn == list(lines.values())
    assert len({line.get_color() for line in axes.lines}) == 2
    assert len({line.get_linestyle() for line in axes.lines}) == 2
    [band] = axes.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (19, 51)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["measured", "predicted"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("segments", "peak, MiB")
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert figure.alt == (
        "Fewer. peak, MiB against segments: measured from 50 to 20; predicted from 48 to 21."
    )
    check_readable(figure)


def test_curves_count_their_points_from_one_and_take_what_loops_give():
    lines = {"loss": [3.0, 2.0, 1.5], "other": (np.array([0.5, 1.0]), np.array([1, 2]))}
    [axes] = figures.curves(lines, "T", "x", "y").axes
    first, second = axes.lines
    assert list(first.get_xdata()) == [1, 2, 3]
    assert list(second.get_xdata()) == [0.5, 1.0]
    assert not all(float(tick).is_integer() for tick in axes.get_xticks())


def test_many_long_curves():
    lines = {str(i): range(i, i + 100) for i in range(9)}
    figure = figures.curves(lines, "Many", "step", "loss")
    assert figure.axes[0].lines[0].get_marker() == "None"
    check_readable(figure)


def test_a_trade_of_bytes_for_time():
    series = {
        "ladder": {"naive": (8 * MiB, 0.5), "between": (4 * MiB, 0.25)},
        "larger": {"all": (MiB, 0.4)},
    }
    figure = figures.trade(series, "Less in less", (8 * MiB, 0.5), unlabelled=["between"])
    [axes] = figure.axes
    points = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert points["ladder"] == [(8, 1), (4, 0.5)] and points["larger"] == [(1, 0.8)]
    assert letters(axes) == ["naive", "all"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert figure.alt == (
        "Less in less. naive 8 MiB, 1.00 × the time; between 4 MiB, 0.50 × the time; all 1 MiB,"
        " 0.80 × the time."
    )
    check_readable(figure)
