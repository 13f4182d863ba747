"""The figures: ledgers as stacked bars on one axis, timelines by column. One palette, everywhere.

Every figure carries an alternative text and its title says what happened.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from memlab.ledger import COLUMNS, Span
from memlab.measurement import Measurement
from memlab.units import GiB, KiB, MiB, format_bytes

if TYPE_CHECKING:
    import numpy as np

    from memlab.comparison import Comparison

#: One colour a column: Okabe and Ito's palette, which people with any colour vision tell apart. In
#: grey print the order, which is always that of `COLUMNS`, and the numbers have to do.
PALETTE = {
    "parameters": "#0072B2",
    "gradients": "#E69F00",
    "optimizer_state": "#009E73",
    "activations": "#D55E00",
    "batch": "#56B4E9",
    "temporaries": "#BBBBBB",
    "unattributed": "#FFFFFF",
}

_DARK = ("parameters", "optimizer_state", "activations")  # colours that take white letters
_PHASE_SHADES = {"forward": "#F4F4F4", "backward": "#E4E4E4", "optimizer": "#CFCFCF"}
_SHORT = {"forward": "fwd", "backward": "bwd", "optimizer": "opt"}
_WIDTH = 7.2  # inches: the text width of a book page
_FONT = 9
_TITLE = 88  # letters in a line of a title


class Drawing(Figure):
    """A matplotlib figure that shows itself in a notebook as a PNG with an alternative text
    (`.alt`).
    """

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        FigureCanvasAgg(self)
        self.alt = ""

    def png(self, dpi: int = 120) -> bytes:
        """The figure as the bytes of a PNG file, `dpi` pixels an inch of its size."""
        buffer = io.BytesIO()
        # Not bbox_inches="tight": the pictures of one slider have to be of one size.
        self.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_: object) -> tuple[dict, dict]:
        data = {
            "image/png": base64.b64encode(self.png()).decode(),
            "text/plain": self.alt or "figure",
        }
        return data, {"image/png": {"alt": self.alt}}


def drawing(height: float, width: float = _WIDTH) -> Drawing:
    """An empty figure in the course's size and style (inches)."""
    return Drawing(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.05))


def headline(figure: Figure, title: str) -> None:
    """Write what happened above a figure, on two lines where one is too short."""
    figure.suptitle(textwrap.fill(title, _TITLE), fontsize=_FONT + 1.5, x=0.01, ha="left")


def unit_for(largest: int) -> tuple[int, str]:
    """The unit in which a figure whose largest value is `largest` bytes is best read."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if largest >= 2 * unit:
            return unit, name
    return 1, "bytes"


def style(axes: Axes) -> Axes:
    """The course's plain style: no box, light grid, small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_FONT - 1, length=3)
    axes.grid(True, axis="both", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def bars(
    axes: Axes,
    ledgers: Mapping[str, Mapping[str, int]],
    predicted: Mapping[str, int | None] | None = None,
    limit: int | None = None,
) -> None:
    """Draw ledgers as horizontal stacked bars on one axis, the first on top.

    Args:
        axes: where to draw.
        ledgers: name → bytes by column.
        predicted: name → predicted peak in bytes; drawn as a triangle below the bar, pointing at
            it.
        limit: a budget in bytes, drawn as a line.
    """
    totals = {name: sum(columns.values()) for name, columns in ledgers.items()}
    marks = [value for value in (predicted or {}).values() if value]
    largest = max([*totals.values(), *marks, limit or 0, 1])
    unit, unit_name = unit_for(largest)
    for row, (name, columns) in enumerate(ledgers.items()):
        left = 0.0
        for column in COLUMNS:
            width = columns.get(column, 0) / unit
            if not width:
                continue
            hatch = "////" if column == "unattributed" else None
            edge = "#666666" if column == "unattributed" else "white"
            axes.barh(
                row,
                width,
                left=left,
                height=0.62,
                color=PALETTE[column],
                edgecolor=edge,
                hatch=hatch,
                lw=0.6,
            )
            number = f"{width:,.0f}" if width >= 99.95 else f"{width:.3g}"
            if width * unit / largest > 0.02 + 0.015 * len(
                number
            ):  # else it does not fit into the bar
                # In an outline of the bar's colour, so that a hatch or the budget's line does not
                # strike it through.
                axes.text(
                    left + width / 2,
                    row,
                    number,
                    ha="center",
                    va="center",
                    fontsize=_FONT - 2,
                    zorder=4,
                    color="white" if column in _DARK else "black",
                    path_effects=[withStroke(linewidth=3, foreground=PALETTE[column])],
                )
            left += width
        axes.text(
            left + 0.012 * largest / unit,
            row,
            format_bytes(totals[name]),
            va="center",
            fontsize=_FONT - 1,
            zorder=4,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
        if predicted and predicted.get(name):
            axes.plot(
                predicted[name] / unit,
                row + 0.38,
                marker="^",
                color="black",
                ms=5,
                clip_on=False,
                zorder=5,
            )
    if limit is not None:
        axes.axvline(limit / unit, color="black", lw=1.2, ls=(0, (4, 2)), zorder=3)
        axes.text(
            limit / unit,
            -0.62,
            f"budget {format_bytes(limit)}",
            fontsize=_FONT - 1,
            va="bottom",
            ha="center",
        )
    axes.set_yticks(range(len(ledgers)), [_wrap(name, 28) for name in ledgers], fontsize=_FONT)
    axes.set_ylim(len(ledgers) - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * largest / unit)
    axes.set_xlabel(f"{unit_name} at the peak", fontsize=_FONT)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    style(axes).grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def legend(figure: Figure, ledgers: Sequence[Mapping[str, int]], predicted: bool = False) -> None:
    """One legend for the columns that occur (at 0.5 % of the largest total or more), below the
    figure.
    """
    largest = max((sum(columns.values()) for columns in ledgers), default=1)
    used = [c for c in COLUMNS if any(columns.get(c, 0) >= 0.005 * largest for columns in ledgers)]
    handles = [
        Patch(
            facecolor=PALETTE[column],
            edgecolor="#666666" if column == "unattributed" else "none",
            hatch="////" if column == "unattributed" else None,
            label=column.replace("_", " "),
        )
        for column in used
    ]
    if predicted:
        handles.append(
            Line2D([], [], marker="^", color="black", ls="", ms=5, label="predicted peak")
        )
    if len(handles) > 7:
        # Two rows of four. matplotlib fills a legend by columns; this order makes it read by rows.
        handles = [handles[index] for index in (0, 4, 1, 5, 2, 6, 3, 7)]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=4 if len(handles) > 7 else 7,
        fontsize=_FONT - 1,
        frameon=False,
        handlelength=1.1,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def stack(
    axes: Axes,
    measurement: Measurement,
    unit: int,
    top: float | None = None,
    inches: float = 0.88 * _WIDTH,
) -> str:
    """Draw one measurement's timeline: bytes by column over time, phases named in a strip above,
    the peak marked.

    Args:
        axes: where to draw.
        measurement: what to draw.
        unit: bytes of one unit of the vertical axis.
        top: the end of the vertical axis, in units; by default a little above the peak.
        inches: about how wide the axes are: a phase that is too short for its name gets three
            letters or none.

    Returns:
        The unit of the horizontal axis: seconds or, for a short run, milliseconds.

    Raises:
        ValueError: nothing was allocated, so there is nothing to draw.
    """
    if not measurement.peak_bytes:
        raise ValueError("the run allocated nothing on this device: there is no timeline to draw")
    ledger = measurement.ledger
    line = measurement.timeline.thin(900)
    phases = ledger.phases
    begin = (phases[0].start - ledger.start) / 1e9 if phases else line.seconds[0]
    length = ((phases[-1].end - ledger.start) / 1e9 if phases else line.seconds[-1]) - begin
    margin = 0.03 * length or 1e-6
    scale, time_unit = (1, "seconds") if length >= 2 else (1000, "milliseconds")

    def place(seconds: np.ndarray | float) -> np.ndarray | float:
        """Where a moment, in seconds since the record began, stands on the axis."""
        return (seconds - begin) * scale

    axes.stackplot(
        place(line.seconds),
        *[line.bytes[column] / unit for column in COLUMNS],
        step="post",
        colors=[PALETTE[column] for column in COLUMNS],
        linewidth=0,
        antialiased=False,
    )
    axes.set_xlim(-margin * scale, (length + margin) * scale)
    axes.xaxis.set_major_locator(MaxNLocator(max(3, int(inches / 0.5)), steps=[1, 2, 5, 10]))
    top = top or 1.14 * measurement.peak_bytes / unit
    axes.set_ylim(0, top)
    style(axes)
    # A strip above the curve names the phases; the letters go only where they fit.
    for span in _joined(phases):
        left, right = (place((moment - ledger.start) / 1e9) for moment in (span.start, span.end))
        axes.axvspan(left, right, ymin=0.945, color=_PHASE_SHADES[span.kind], lw=0)
        if (
            right - left > 0.01 * length * scale
        ):  # the lines of many short phases would cover the curve
            axes.axvline(left, color="#AAAAAA", lw=0.5)
        room = inches * (right - left) / scale / (length + 2 * margin) / 0.06  # in letters
        letters = next(
            (word for word in (span.kind, _SHORT.get(span.kind, "")) if len(word) < room), ""
        )
        axes.text(
            (left + right) / 2, 0.972 * top, letters, ha="center", va="center", fontsize=_FONT - 2.5
        )
    peak = max(place((ledger.peak_time - ledger.start) / 1e9), -margin * scale)
    axes.plot(
        peak, measurement.peak_bytes / unit, "v", color="black", ms=4, clip_on=False, zorder=5
    )
    return time_unit


def _joined(phases: Sequence[Span]) -> list[Span]:
    """Phases in time, with an optimizer's many small steps as one: each would be a line, and all
    together a bar.
    """
    joined: list[Span] = []
    for span in phases:
        if joined and joined[-1].kind == span.kind == "optimizer":
            joined[-1] = joined[-1]._replace(end=span.end)
        else:
            joined.append(span)
    return joined


def timeline(measurement: Measurement, title: str | None = None) -> Drawing:
    """One measurement's timeline by column: what was alive when, in forward, backward and the
    optimizer.
    """
    figure = drawing(3.0)
    axes = figure.subplots()
    unit, name = unit_for(measurement.peak_bytes)
    time_unit = stack(axes, measurement, unit)
    axes.set_xlabel(f"{time_unit} since the first step began", fontsize=_FONT)
    axes.set_ylabel(f"{name} alive", fontsize=_FONT)
    title = title or f"Peak {format_bytes(measurement.peak_bytes)}, in {measurement.phase}"
    headline(figure, title)
    legend(figure, [measurement.columns, *_all_columns(measurement)])
    figure.alt = (
        f"Timeline of memory by column. {title}. At the peak: {_in_words(measurement.columns)}."
    )
    return figure


def ledgers(
    columns: Mapping[str, Mapping[str, int]],
    title: str,
    predicted: Mapping[str, int | None] | None = None,
    limit: int | None = None,
) -> Drawing:
    """Ledgers as stacked bars on one axis, from plain numbers (name → bytes by column)."""
    figure = drawing(
        1.2 + 0.42 * len(columns) + 0.2 * (limit is not None) + 0.2 * (len(title) > _TITLE)
    )
    bars(figure.subplots(), columns, predicted, limit)
    headline(figure, title)
    legend(figure, list(columns.values()), bool(predicted and any(predicted.values())))
    figure.alt = _alt(title, columns, predicted, limit)
    return figure


def ladder(
    columns: Mapping[str, Mapping[str, int]],
    title: str,
    predicted: Mapping[str, int | None] | None = None,
) -> Drawing:
    """Ledgers that shrink step by step, from plain numbers, the first on top. The small ones are
    drawn once more, enlarged.

    Small are those from the first on that is below an eighth of the largest, if no later one is
    above it.
    """
    totals = {name: sum(held.values()) for name, held in columns.items()}
    names = list(columns)
    count = next(
        (n for n, name in enumerate(reversed(names)) if totals[name] > max(totals.values()) / 8),
        len(names),
    )
    small = (
        {name: columns[name] for name in names[len(names) - count :]}
        if 1 < count < len(names)
        else {}
    )
    rows = [1 + 0.27 * len(columns), 1 + 0.27 * len(small)] if small else [1 + 0.27 * len(columns)]
    figure = drawing(0.6 + sum(rows) + 0.2 * (len(title) > _TITLE))
    parts = figure.subfigures(len(rows), 1, height_ratios=rows, squeeze=False)[:, 0]
    for part, held in zip(parts, (columns, small), strict=False):
        bars(part.subplots(), held, predicted and {name: predicted.get(name) for name in held})
    if small:
        parts[1].axes[0].set_title(
            f"The last {len(small)} of them, enlarged", fontsize=_FONT, loc="left"
        )
    headline(figure, title)
    legend(figure, list(columns.values()), bool(predicted and any(predicted.values())))
    figure.alt = _alt(title, columns, predicted)
    return figure


def comparison(compared: Comparison, title: str | None = None) -> Drawing:
    """The one figure of every notebook: ledgers on one axis with the predictions, timelines below
    on one axis.
    """
    variants = compared.variants
    # More than three timelines side by side cannot be read: the first and the last tell the story.
    timelines = variants if len(variants) <= 3 else [variants[0], variants[-1]]
    figure = drawing(3.4 + 0.4 * len(variants))
    # Two figures in one, so that long names beside the bars take no room from the timelines.
    above, below = figure.subfigures(2, 1, height_ratios=[0.75 + 0.42 * len(variants), 2.3])
    columns = {variant.name: variant.measurement.columns for variant in variants}
    predicted = {variant.name: variant.predicted_bytes for variant in variants}
    bars(above.subplots(), columns, predicted)
    largest = max(variant.measurement.peak_bytes for variant in variants)
    unit, unit_name = unit_for(largest)
    count = len(timelines)
    row = below.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, variant in zip(row, timelines, strict=True):
        inches = (0.92 * _WIDTH - 0.1) / count - 0.1
        time_unit = stack(axes, variant.measurement, unit, 1.14 * largest / unit, inches)
        axes.set_title(_wrap(variant.name, 84 // count), fontsize=_FONT, loc="left")
        axes.set_xlabel(time_unit, fontsize=_FONT)
    row[0].set_ylabel(f"{unit_name} alive", fontsize=_FONT)
    title = title or compared.verdict
    headline(figure, title)
    every = [m for variant in timelines for m in _all_columns(variant.measurement)]
    legend(figure, [*columns.values(), *every], any(predicted.values()))
    figure.alt = _alt(title, columns, predicted)
    return figure


def curves(
    lines: Mapping[str, Sequence[float] | tuple[Sequence[float], Sequence[float]]],
    title: str,
    x_label: str,
    y_label: str,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Drawing:
    """Lines, such as losses over steps: name → y values (at 1, 2, ...), or name → (x values, y
    values).

    `bands` shades a range around a line: name → (lower values, upper values).
    """
    figure = drawing(2.7)
    axes = style(figure.subplots())
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    dashes = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)), "-", "-", "-"]
    every_x, ends = [], []
    for number, (name, line) in enumerate(lines.items()):
        x, y = line if isinstance(line, tuple) else (range(1, len(line) + 1), line)
        every_x.extend(x)
        ends.append(f"{name} from {y[0]:,.4g} to {y[-1]:,.4g}")
        look = {"color": colours[number % 7], "linestyle": dashes[number % 7], "linewidth": 1.5}
        axes.plot(x, y, label=name, marker="o" if len(y) <= 12 else None, ms=3.5, **look)
        if bands and name in bands:
            axes.fill_between(x, *bands[name], color=look["color"], alpha=0.15, lw=0)
    whole = all(float(value).is_integer() for value in every_x)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=whole))
    axes.set_xlabel(x_label, fontsize=_FONT)
    axes.set_ylabel(y_label, fontsize=_FONT)
    axes.legend(fontsize=_FONT - 1, frameon=False)
    headline(figure, title)
    figure.alt = f"{title}. {y_label} against {x_label}: {'; '.join(ends)}."
    return figure


def trade(
    series: Mapping[str, Mapping[str, tuple[int, float]]],
    title: str,
    base: tuple[int, float],
    unlabelled: Collection[str] = (),
) -> Drawing:
    """What bytes cost in time: series → name of a point → (bytes at the peak, seconds of a step).

    Both axes are logarithmic. Seconds are drawn in times those of `base`, whose lines part the
    figure in four: down and to the left is less memory in less time. Points whose names are in
    `unlabelled` are drawn without them.
    """
    figure = drawing(4.6)
    axes = style(figure.subplots())
    axes.axhline(1, color="#666666", linewidth=0.8)
    axes.axvline(base[0] / MiB, color="#666666", linewidth=0.8)
    words = []
    for number, (name, points) in enumerate(series.items()):
        colour = ["#666666", "#0072B2", "#D55E00"][number % 3]
        x, y = [b / MiB for b, _ in points.values()], [s / base[1] for _, s in points.values()]
        axes.plot(x, y, marker="o", ms=4, linewidth=1.2, color=colour, label=name)
        for label, one_x, one_y in zip(points, x, y, strict=True):
            words.append(f"{label} {one_x:,.0f} MiB, {one_y:.2f} × the time")
            if label not in unlabelled:
                beside = (
                    (4, 4) if number else (4, -11)
                )  # the first series' labels below: they would cover others
                axes.annotate(
                    label,
                    (one_x, one_y),
                    beside,
                    textcoords="offset points",
                    fontsize=_FONT - 2,
                    color=colour,
                )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("MiB at the peak", fontsize=_FONT)
    axes.set_ylabel("× time", fontsize=_FONT)
    figure.legend(fontsize=_FONT - 1, frameon=False, loc="outside lower center", ncols=3)
    headline(figure, title)
    figure.alt = f"{title}. {'; '.join(words)}."
    return figure


def _wrap(name: str, width: int) -> str:
    return "\n".join(textwrap.wrap(name, width, max_lines=2, placeholder="…"))


def _alt(
    title: str,
    columns: Mapping[str, Mapping[str, int]],
    predicted: Mapping[str, int | None] | None,
    limit: int | None = None,
) -> str:
    """The alternative text of ledgers: everything that the bars show."""
    lines = [f"{title}."]
    for name, held in columns.items():
        beside = (
            f", predicted {format_bytes(predicted[name])}"
            if predicted and predicted.get(name)
            else ""
        )
        lines.append(f"{name}: {format_bytes(sum(held.values()))}{beside} ({_in_words(held)}).")
    return " ".join(lines + [f"The budget is {format_bytes(limit)}."] * (limit is not None))


def _in_words(columns: Mapping[str, int]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {format_bytes(columns[name])}"
        for name in COLUMNS
        if columns.get(name)
    )


def _all_columns(measurement: Measurement) -> list[dict[str, int]]:
    """The most that each column ever held: a column can be large away from the peak."""
    return [
        {column: int(values.max()) if len(values) else 0}
        for column, values in measurement.timeline.bytes.items()
    ]
