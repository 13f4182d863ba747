"""The figures, drawn from real small runs: what the bars add up to, what is marked where, what can
be read.
"""

import base64
import gc
import io
import itertools
import struct
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text
from torch.utils.checkpoint import checkpoint

from memlab import figures
from memlab.compare import compare
from memlab.ledger import COLUMNS, Block, Ledger, Span
from memlab.measure import measure
from memlab.measurement import Measurement
from memlab.units import GiB, KiB, MiB, format_bytes
from memlab.workloads import gpt

pytestmark = pytest.mark.usefixtures("objects_frozen")


def run(batch=4, checkpointed=False):
    def build():
        torch.manual_seed(0)
        model = gpt.GPT(gpt.tiny(layers=2))
        if checkpointed:
            for block in model.blocks:
                forward = type(block).forward.__get__(block)
                block.forward = lambda x, forward=forward: checkpoint(
                    forward, x, use_reentrant=False
                )
        optimizer = torch.optim.AdamW(model.parameters())
        tokens = torch.randint(256, (batch, 64))

        def step():
            loss = model(tokens, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    return build


@pytest.fixture(scope="module")
def runs():
    built = {
        "plain": run(),
        "a checkpoint a block": run(checkpointed=True),
        "batch 8": run(8),
        "batch 2, with a name that is too long for a line": run(2),
        "batch 1": run(1),
    }
    return {name: measure(build, device="cpu") for name, build in built.items()}


def ledger(**columns):
    return dict.fromkeys(COLUMNS, 0) | columns


def bars_of(axes, unit):
    """For each row, bytes and colour from left to right, of the bars as they are drawn."""
    rows = {}
    for bar in axes.patches:
        rows.setdefault(round(bar.get_y() + bar.get_height() / 2), []).append(bar)
    return {
        row: [
            (b.get_x() * unit, b.get_width() * unit, to_hex(b.get_facecolor()), b.get_hatch())
            for b in bars
        ]
        for row, bars in rows.items()
    }


def marks(axes, marker):
    return [
        (*line.get_xdata(), *line.get_ydata()) for line in axes.lines if line.get_marker() == marker
    ]


def letters(axes):
    return [text.get_text() for text in axes.texts]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def check_bars(axes, ledgers, unit):
    drawn = bars_of(axes, unit)
    for row, columns in enumerate(ledgers):
        held = [(name, size) for name, size in columns.items() if size]
        assert [colour for _, _, colour, _ in drawn.get(row, [])] == [
            figures.PALETTE[name].lower() for name, _ in held
        ]
        before = 0
        for (left, width, _, hatch), (name, size) in zip(drawn.get(row, []), held, strict=True):
            assert (left, width) == (pytest.approx(before), pytest.approx(size)), name
            assert (hatch is not None) == (name == "unattributed")
            before += size
        assert before == sum(columns.values())
        assert format_bytes(sum(columns.values())) in letters(axes)


def words(figure):
    """Every text that can be read in a figure, with its place in pixels and its size."""
    figure.draw_without_rendering()
    of_ticks, drawn = set(), []
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            of_ticks |= {tick.label1, tick.label2}
            if low <= tick.get_loc() <= high:  # the others matplotlib keeps and does not draw
                drawn.append(tick.label1)
    texts = [text for text in figure.findobj(Text) if text not in of_ticks] + drawn
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(), text.get_fontsize()) for text in texts]


def check_readable(figure):
    """Nothing is cut off, no two texts overlap, and no letter is too small for print."""
    found = words(figure)
    width, height = figure.get_size_inches() * figure.dpi
    for text, box, size in found:
        assert size >= 6.5, text
        assert (
            -0.5 <= box.x0 and box.x1 <= width + 0.5 and -0.5 <= box.y0 and box.y1 <= height + 0.5
        ), text
    for (one, first, _), (other, second, _) in itertools.combinations(found, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert across <= 0.5 or down <= 0.5, f"{one!r} overlaps {other!r}"


# The palette and the picture ----------------------------------------------------------------------


def test_every_column_has_a_colour_of_its_own():
    assert tuple(figures.PALETTE) == COLUMNS
    colours = [np.array(to_rgb(colour)) for colour in figures.PALETTE.values()]
    assert min(np.abs(a - b).sum() for a, b in itertools.combinations(colours, 2)) > 0.3


def test_a_figure_shows_itself_as_a_png_with_an_alternative_text(runs):
    figure = figures.timeline(runs["plain"])
    data, metadata = figure._repr_mimebundle_(include=None, exclude=None)
    assert data.keys() == {"image/png", "text/plain"}
    assert data["text/plain"] == metadata["image/png"]["alt"] == figure.alt
    assert metadata.keys() == {"image/png"}
    picture = base64.b64decode(data["image/png"])
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert (width, height) == (round(7.2 * 120), round(3.0 * 120))
    assert struct.unpack(">II", figure.png(dpi=50)[16:24]) == (360, 150)
    # No version of matplotlib, no date: the same run gives the same file.
    assert b"matplotlib" not in picture and figures.timeline(runs["plain"]).png() == picture


def test_it_shows_itself_in_ipython(runs):
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    figure = figures.timeline(runs["plain"])
    data, metadata = formatter.format(figure)
    assert data["text/plain"] == figure.alt and metadata["image/png"]["alt"] == figure.alt
    assert "image/png" in data


def test_pyplot_is_left_alone(runs):
    imported = "matplotlib.pyplot" in sys.modules
    if imported:
        from matplotlib import pyplot

        before = pyplot.get_fignums()
    figures.timeline(runs["plain"]).png()
    compare(runs["plain"], runs["batch 1"]).plot().png()
    assert ("matplotlib.pyplot" in sys.modules) == imported
    if imported:
        assert pyplot.get_fignums() == before


def test_a_figure_that_is_not_needed_any_more_goes(runs):
    figure = figures.timeline(runs["plain"])
    figure.png()
    del figure
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is figures.Drawing]


# Ledgers ------------------------------------------------------------------------------------------


def test_bars_add_up_to_the_ledgers_totals(runs):
    columns = {name: run.columns for name, run in runs.items()}
    figure = figures.ledgers(columns, "Five bars")
    (axes,) = figure.axes
    check_bars(axes, columns.values(), MiB)
    assert axes.get_xlabel() == "MiB at the peak"
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert names == list(columns)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    # The batch is too thin to be seen.
    assert legend(figure) == [
        "parameters",
        "gradients",
        "optimizer state",
        "activations",
        "temporaries",
    ]
    assert figure.get_suptitle() == "Five bars"
    for name, run in runs.items():
        parameters = format_bytes(run.columns["parameters"])
        assert f"{name}: {format_bytes(run.peak_bytes)} (parameters {parameters}, " in figure.alt
    check_readable(figure)


def test_predictions_and_the_budget_stand_where_they_belong():
    columns = {
        "one": ledger(parameters=30 * MiB, activations=70 * MiB),
        "two": ledger(parameters=50 * MiB),
    }
    predicted = {"one": 110 * MiB, "two": None}
    figure = figures.ledgers(columns, "Title", predicted, limit=60 * MiB)
    (axes,) = figure.axes
    ((at, row),) = marks(axes, "^")
    assert at * MiB == pytest.approx(110 * MiB)
    assert 0.31 < row < 0.5  # below the first bar, above the second
    (line,) = [
        line
        for line in axes.lines
        if len(set(line.get_xdata())) == 1 and line.get_marker() == "None"
    ]
    assert line.get_xdata()[0] * MiB == pytest.approx(60 * MiB)
    assert "budget 60.00 MiB" in letters(axes)
    assert legend(figure) == ["parameters", "activations", "predicted peak"]
    assert (
        figure.alt
        == "Title. one: 100.00 MiB, predicted 110.00 MiB (parameters 30.00 MiB, activations 70.00"
        " MiB). two: 50.00 MiB (parameters 50.00 MiB). The budget is 60.00 MiB."
    )
    # Without predictions the legend does not name them.
    assert "predicted peak" not in legend(figures.ledgers(columns, "Title", {"one": None}))


@pytest.mark.parametrize(
    "size, unit, name",
    [(3 * GiB, GiB, "GiB"), (2 * GiB - 1, MiB, "MiB"), (3 * KiB, KiB, "KiB"), (900, 1, "bytes")],
)
def test_the_unit_fits_the_largest(size, unit, name):
    assert figures.unit_for(size) == (unit, name)
    columns = {"large": ledger(parameters=size), "small": ledger(activations=size // 100)}
    figure = figures.ledgers(columns, "Title")
    assert figure.axes[0].get_xlabel() == f"{name} at the peak"
    check_bars(figure.axes[0], columns.values(), unit)
    check_readable(figure)


EVERYTHING = {column: 100 * MiB for column in COLUMNS}
ODD = {
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
    "a budget at the left": ({"one": ledger(activations=90 * MiB)}, {"limit": MiB}),
    "a budget at the right": ({"one": ledger(activations=90 * MiB)}, {"limit": 90 * MiB + 1}),
    "a budget beyond the bars": ({"one": ledger(activations=9 * MiB)}, {"limit": 90 * MiB}),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize(
    "title",
    [
        "Short",
        (
            "Peak 1,023.99 MiB → 512.00 MiB (2.00× less): a title as long as they come, on two"
            " lines at least"
        ),
    ],
)
def test_odd_ledgers_can_be_read(case, title):
    columns, more = ODD[case]
    figure = figures.ledgers(columns, title, **more)
    largest = max([sum(held.values()) for held in columns.values()] + [more.get("limit", 0)])
    check_bars(figure.axes[0], columns.values(), figures.unit_for(largest)[0])
    check_readable(figure)
    assert figure.get_suptitle().replace("\n", " ") == title


def test_the_legend_reads_by_rows():
    figure = figures.ledgers({"all": EVERYTHING}, "Title", {"all": 700 * MiB})
    boxes = {text: box for text, box, _ in words(figure)}
    names = [column.replace("_", " ") for column in COLUMNS] + ["predicted peak"]
    assert sorted(names, key=lambda name: (-round(boxes[name].y0), boxes[name].x0)) == names


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
    shown = [label.get_text().replace("\n", " ") for label in enlarged.get_yticklabels()]
    assert shown == list(LADDER)[2:]
    assert enlarged.get_xlim()[1] == pytest.approx(
        116
    )  # MiB: the axis ends a little beyond the largest of them
    assert "The last 3 of them, enlarged" in {text for text, _, _ in words(figure)}
    assert figure.get_suptitle() == "Peak 800.00 MiB → 5.00 MiB"
    # What is small in the whole is in the legend if it is half a percent of it.
    assert legend(figure) == ["parameters", "optimizer state", "activations", "unattributed"]
    check_readable(figure)


def test_the_alternative_text_of_a_ladder_names_every_rung_once():
    figure = figures.ladder(
        LADDER, "Title", {"in BF16": 510 * MiB, "8-bit state": 61 * MiB, "as it is": None}
    )
    assert (
        figure.alt
        == "Title. as it is: 800.00 MiB (parameters 200.00 MiB, activations 600.00 MiB). in BF16:"
        " 500.00 MiB, predicted 510.00 MiB (parameters 200.00 MiB, activations 300.00 MiB)."
        " recomputed: 100.00 MiB (parameters 70.00 MiB, activations 30.00 MiB). 8-bit state:"
        " 60.00 MiB, predicted 61.00 MiB (parameters 40.00 MiB, optimizer state 10.00 MiB,"
        " unattributed 10.00 MiB). streamed, with a name that is too long for a line: 5.00 MiB"
        " (parameters 5.00 MiB)."
    )


def test_the_predictions_of_a_ladder_stand_in_both_parts():
    figure = figures.ladder(LADDER, "Title", {"in BF16": 510 * MiB, "8-bit state": 61 * MiB})
    found = [[(at, int(row)) for at, row in marks(axes, "^")] for axes in figure.axes]
    assert found == [[(510, 1), (61, 3)], [(61, 1)]]
    assert "predicted peak" in legend(figure)
    check_readable(figure)
    for nothing in (None, {}, {"in BF16": None}):
        without = figures.ladder(LADDER, "Title", nothing)
        assert [marks(axes, "^") for axes in without.axes] == [[], []]
        assert "predicted peak" not in legend(without) and "predicted" not in without.alt


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
    assert len(figure.axes) == 1 + bool(small)
    assert len(figure.axes[0].get_yticks()) == len(totals)
    if small:
        assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == list(rungs)[
            -small:
        ]
    check_readable(figure)


def test_a_long_title_of_a_ladder_has_room():
    title = (
        "Peak 1,023.99 MiB → 5.00 MiB (205× less): a title as long as they come, on two lines at"
        " least"
    )
    figure = figures.ladder(LADDER, title)
    assert figure.get_suptitle().replace("\n", " ") == title
    assert figure.get_size_inches()[1] > figures.ladder(LADDER, "Short").get_size_inches()[1]
    check_readable(figure)


# Timelines ----------------------------------------------------------------------------------------


def check_stack(axes, run, unit):
    """The layers' upper edge reaches the peak, and a mark stands on it."""
    *_, top = (collection for collection in axes.collections if len(collection.get_paths()))
    assert len(axes.collections) == len(COLUMNS)
    assert top.get_paths()[0].vertices[:, 1].max() * unit == pytest.approx(run.peak_bytes)
    colours = [to_hex(collection.get_facecolor()[0]) for collection in axes.collections]
    assert colours == [colour.lower() for colour in figures.PALETTE.values()]
    ((at, height),) = marks(axes, "v")
    assert height * unit == pytest.approx(run.peak_bytes)
    nanoseconds = {"seconds": 1e9, "milliseconds": 1e6}[axes.get_xlabel().split()[0]]
    assert at == pytest.approx((run.ledger.peak_time - run.ledger.phases[0].start) / nanoseconds)


@pytest.mark.parametrize("name", ["plain", "a checkpoint a block", "batch 1"])
def test_a_timeline(runs, name):
    run = runs[name]
    figure = figures.timeline(run)
    (axes,) = figure.axes
    check_stack(axes, run, figures.unit_for(run.peak_bytes)[0])
    title = f"Peak {format_bytes(run.peak_bytes)}, in {run.phase}"
    assert figure.get_suptitle() == title
    assert figure.alt.startswith(f"Timeline of memory by column. {title}. At the peak: parameters ")
    assert axes.get_xlabel().endswith("seconds since the first step began")
    assert axes.get_ylabel() == "MiB alive"
    named = {text for text in letters(axes) if text}
    assert (
        named <= {"forward", "backward", "optimizer", "fwd", "bwd", "opt"}
        and {"fwd", "forward"} & named
    )
    # Each phase has its stretch of the strip, and the strip is above the curve.
    assert len(axes.patches) == len(run.ledger.phases)
    assert 0.945 * axes.get_ylim()[1] > run.peak_bytes / figures.unit_for(run.peak_bytes)[0]
    check_readable(figure)


def test_a_timeline_without_steps_of_a_model_and_one_of_nothing():
    def build():
        kept = torch.zeros(1000)
        return lambda: torch.zeros(2000) is kept

    figure = figures.timeline(measure(build, device="cpu"), "Two tensors")
    assert marks(figure.axes[0], "v")[0][1] == pytest.approx(12_000 / KiB)
    check_readable(figure)
    with pytest.raises(ValueError, match="allocated nothing on this device"):
        figures.timeline(measure(lambda: lambda: None, device="cpu"))


def test_an_optimizer_that_steps_once_a_parameter_is_one_phase_of_the_strip():
    kinds = (
        "forward backward optimizer optimizer optimizer forward backward optimizer backward"
        " optimizer".split()
    )
    phases = [Span(10 * i, 10 * i + 10, kind) for i, kind in enumerate(kinds)]
    joined = figures._joined(phases)
    assert [span.kind for span in joined] == [*kinds[:3], *kinds[5:]]
    assert (joined[2].start, joined[2].end) == (20, 50) and joined[3:] == phases[5:]


def test_a_hundred_short_phases_draw_no_lines_over_the_curve():
    run = of_length(1.0, shares=(40, 40, *[0.1, 0.1] * 100))
    run.ledger.phases[:] = [
        span._replace(kind=kind)
        for span, kind in zip(
            run.ledger.phases,
            ["forward", "backward", *["optimizer", "backward"] * 100],
            strict=True,
        )
    ]
    axes = figures.timeline(run).axes[0]
    assert (
        sum(len(line.get_xdata()) == 2 for line in axes.lines) == 2
    )  # where forward and backward begin


def of_length(seconds, shares=(4, 3, 1, 2, 5, 1)):
    """A measurement of two steps that take so many seconds, their phases in these shares."""
    ends = [round(1e9 * seconds * share / sum(shares)) for share in itertools.accumulate(shares)]
    kinds = itertools.cycle(("forward", "backward", "optimizer"))
    phases = [
        Span(start, end, kind) for start, end, kind in zip([0, *ends], ends, kinds, strict=False)
    ]
    blocks = [
        Block(3 * MiB, 1, 0, column="parameters"),
        Block(MiB, 2, ends[0] // 2, ends[1], column="activations"),
    ]
    made = Ledger(blocks, phases, 0, ends[-1])
    return Measurement(made.peak_bytes, made.peak_columns(), "forward", made, {})


@pytest.mark.parametrize(
    "seconds, unit",
    [
        (4e-5, "milliseconds"),
        (0.03, "milliseconds"),
        (1.9, "milliseconds"),
        (2.1, "seconds"),
        (4000, "seconds"),
    ],
)
def test_short_and_long_timelines_can_be_read(seconds, unit):
    run = of_length(seconds)
    figure = figures.timeline(run)
    assert figure.axes[0].get_xlabel() == f"{unit} since the first step began"
    check_stack(figure.axes[0], run, MiB)
    assert letters(figure.axes[0]) == ["forward", "backward", "opt", "forward", "backward", "opt"]
    check_readable(figure)
    # Side by side there is less room for the names of the phases: one that does not fit is left
    # out.
    figure = compare(
        of_length(seconds / 3), run, of_length(seconds / 7, (1, 1, 1, 1, 1, 30))
    ).plot()
    assert letters(figure.axes[2]) == ["forward", "bwd", "", "fwd", "backward", ""]
    assert letters(figure.axes[3]) == ["", "", "", "", "", "optimizer"]
    check_readable(figure)


# Comparisons --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_comparison(runs, count):
    chosen = dict(itertools.islice(runs.items(), count))
    predicted = [run.peak_bytes + 1000 * number for number, run in enumerate(chosen.values(), 1)]
    compared = compare(*chosen.values(), names=list(chosen), predicted=predicted)
    figure = figures.comparison(compared)
    above, *below = figure.axes
    check_bars(above, [run.columns for run in chosen.values()], MiB)
    assert [at * MiB for at, _ in marks(above, "^")] == pytest.approx(predicted)
    assert [round(row) for _, row in marks(above, "^")] == list(range(count))
    # Up to three timelines; of more, the first and the last. All on one axis.
    shown = list(chosen) if count <= 3 else [list(chosen)[0], list(chosen)[-1]]
    assert [axes.get_title(loc="left").replace("\n", " ").rstrip("…") for axes in below] == shown
    for axes, name in zip(below, shown, strict=True):
        check_stack(axes, chosen[name], MiB)
        assert axes.get_ylim() == below[0].get_ylim()
        assert len([text for text in letters(axes) if text]) >= 2
    assert figure.get_suptitle().replace("\n", " ") == compared.verdict
    assert figure.alt.startswith(compared.verdict)
    for name, size in zip(chosen, predicted, strict=True):
        assert (
            f"{name}: {format_bytes(chosen[name].peak_bytes)}, predicted {format_bytes(size)} ("
            in figure.alt
        )
    width, height = figure.get_size_inches()
    assert width == 7.2 and height <= 6
    assert legend(figure)[-1] == "predicted peak"
    check_readable(figure)


def test_a_comparison_without_predictions(runs):
    figure = compare(runs["plain"], runs["batch 1"]).plot("A title of its own")
    assert marks(figure.axes[0], "^") == [] and "predicted peak" not in legend(figure)
    assert figure.get_suptitle() == "A title of its own" and figure.alt.startswith(
        "A title of its own. before: "
    )
    assert "predicted" not in figure.alt


# Curves -------------------------------------------------------------------------------------------


def test_curves():
    lines = {"measured": ([1, 2, 4], [50.0, 30.0, 20.0]), "predicted": ([1, 2, 4], [48, 31, 21])}
    figure = figures.curves(
        lines, "Fewer", "segments", "peak, MiB", bands={"measured": ([49, 29, 19], [51, 31, 21])}
    )
    (axes,) = figure.axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] == list(
        lines.values()
    )
    assert (
        len({line.get_color() for line in axes.lines})
        == len({line.get_linestyle() for line in axes.lines})
        == 2
    )
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (19, 51)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["measured", "predicted"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("segments", "peak, MiB")
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert (
        figure.alt
        == "Fewer. peak, MiB against segments: measured from 50 to 20; predicted from 48 to 21."
    )
    check_readable(figure)


def test_curves_count_their_points_from_one_and_take_what_loops_give():
    figure = figures.curves(
        {"loss": [3.0, 2.0, 1.5], "other": (np.array([0.5, 1.0]), np.array([1, 2]))}, "T", "x", "y"
    )
    first, second = figure.axes[0].lines
    assert list(first.get_xdata()) == [1, 2, 3]
    assert list(second.get_xdata()) == [0.5, 1.0]
    assert not all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())
    figure = figures.curves({str(i): range(i, i + 100) for i in range(9)}, "Many", "step", "loss")
    assert figure.axes[0].lines[0].get_marker() == "None"
    check_readable(figure)


def test_the_png_can_be_opened(runs):
    image = pytest.importorskip("PIL.Image")
    opened = image.open(io.BytesIO(figures.timeline(runs["plain"]).png()))
    pixels = np.asarray(opened.convert("RGB"))
    # The curve is there, in the palette's colours.
    for column in ("parameters", "activations", "optimizer_state"):
        colour = np.array([round(255 * part) for part in to_rgb(figures.PALETTE[column])])
        assert (pixels == colour).all(axis=2).mean() > 0.01, column


def test_a_trade_of_bytes_for_time():
    series = {
        "ladder": {"naive": (8 * MiB, 0.5), "between": (4 * MiB, 0.25)},
        "larger": {"all": (MiB, 0.4)},
    }
    figure = figures.trade(series, "Less in less", (8 * MiB, 0.5), unlabelled=["between"])
    (axes,) = figure.axes
    points = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert points["ladder"] == [(8, 1), (4, 0.5)] and points["larger"] == [(1, 0.8)]
    assert [text.get_text() for text in axes.texts] == ["naive", "all"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    words = (
        "naive 8 MiB, 1.00 × the time; between 4 MiB, 0.50 × the time; all 1 MiB, 0.80 × the time"
    )
    assert figure.alt == f"Less in less. {words}."
    check_readable(figure)
