"""What the figures' tests make up, and what they read off a figure."""

import itertools

import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from memlab.figures import PALETTE
from memlab.ledger import COLUMNS, Block, Ledger, Span
from memlab.measurement import Measurement
from memlab.units import MiB, format_bytes

EVERYTHING = {column: 100 * MiB for column in COLUMNS}
LONG_TITLE = (
    "Peak 1,023.99 MiB → 512.00 MiB (2.00× less): a title as long as they come, on two lines at"
    " least"
)


def ledger(**columns):
    return dict.fromkeys(COLUMNS, 0) | columns


def of_length(seconds, shares=(4, 3, 1, 2, 5, 1), kinds=("forward", "backward", "optimizer")):
    """A measurement that takes so many seconds: its phases have these shares and, in turn, kinds.

    Its peak is 4 MiB: 3 of parameters all the time, one of activations from the middle of the first
    phase to the end of the second.
    """
    ends = [round(1e9 * seconds * share / sum(shares)) for share in itertools.accumulate(shares)]
    phases = [
        Span(start, end, kind)
        for start, end, kind in zip([0, *ends], ends, itertools.cycle(kinds), strict=False)
    ]
    blocks = [
        Block(3 * MiB, 1, 0, column="parameters"),
        Block(MiB, 2, ends[0] // 2, ends[1], column="activations"),
    ]
    made = Ledger(blocks, phases, 0, ends[-1])
    return Measurement(made.peak_bytes, made.peak_columns(), "forward", made, {})


def marks(axes, marker):
    """Where the marks of a kind stand: (x, y) of each."""
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return [(*line.get_xdata(), *line.get_ydata()) for line in lines]


def letters(axes):
    return [text.get_text() for text in axes.texts]


def rows(axes):
    """The names beside the bars."""
    return [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]


def title(figure):
    return figure.get_suptitle().replace("\n", " ")


def in_legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def check_bars(axes, ledgers, unit):
    """For each ledger a bar: its columns from left to right, each as wide as it has bytes."""
    for row, columns in enumerate(ledgers):
        bars = [bar for bar in axes.patches if round(bar.get_y() + bar.get_height() / 2) == row]
        held = {name: size for name, size in columns.items() if size}
        end = 0
        for bar, (name, size) in zip(bars, held.items(), strict=True):
            assert bar.get_x() * unit == pytest.approx(end), name
            assert bar.get_width() * unit == pytest.approx(size), name
            assert to_hex(bar.get_facecolor()) == PALETTE[name].lower()
            assert (bar.get_hatch() is not None) == (name == "unattributed")
            end += size
        assert format_bytes(sum(columns.values())) in letters(axes)


def check_stack(axes, run, unit):
    """The layers' upper edge reaches the peak, and a mark stands on it."""
    *_, top = (collection for collection in axes.collections if len(collection.get_paths()))
    assert top.get_paths()[0].vertices[:, 1].max() * unit == pytest.approx(run.peak_bytes)
    colours = [to_hex(collection.get_facecolor()[0]) for collection in axes.collections]
    assert colours == [colour.lower() for colour in PALETTE.values()]
    [(moment, height)] = marks(axes, "v")
    assert height * unit == pytest.approx(run.peak_bytes)
    nanoseconds = {"seconds": 1e9, "milliseconds": 1e6}[axes.get_xlabel().split()[0]]
    since_first_phase = run.ledger.peak_time - run.ledger.phases[0].start
    assert moment == pytest.approx(since_first_phase / nanoseconds)


def words(figure):
    """Every text that can be read in a figure, with its place in pixels and its size."""
    figure.draw_without_rendering()
    of_ticks, drawn = set(), []
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            of_ticks |= {tick.label1, tick.label2}
            # The others matplotlib keeps and does not draw.
            if low <= tick.get_loc() <= high:
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
        assert -0.5 <= box.x0 and box.x1 <= width + 0.5, text
        assert -0.5 <= box.y0 and box.y1 <= height + 0.5, text
    for (text, first, _), (other, second, _) in itertools.combinations(found, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert across <= 0.5 or down <= 0.5, f"{text!r} overlaps {other!r}"
