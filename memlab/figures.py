"""The figures: ledgers as stacked bars on one axis, timelines by column. One palette, everywhere.

Every figure carries an alternative text and its title says what happened.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from memlab.ledger import COLUMNS
from memlab.measure import Measurement
from memlab.units import GiB, KiB, MiB, format_bytes

if TYPE_CHECKING:
    from memlab.compare import Comparison

#: One colour a column (Okabe and Ito's palette, told apart by people with any colour vision and in grey print).
PALETTE = {
    "parameters": "#0072B2",
    "gradients": "#E69F00",
    "optimizer_state": "#009E73",
    "activations": "#D55E00",
    "batch": "#56B4E9",
    "temporaries": "#BBBBBB",
    "unattributed": "#FFFFFF",
}

_PHASE_SHADES = {"forward": "#F4F4F4", "backward": "#E4E4E4", "optimizer": "#CFCFCF"}
_SHORT = {"forward": "fwd", "backward": "bwd", "optimizer": "opt"}
_WIDTH = 7.2  # inches: the text width of a book page
_FONT = 9


class Drawing(Figure):
    """A matplotlib figure that shows itself in a notebook as a PNG with an alternative text (`.alt`)."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        FigureCanvasAgg(self)
        self.alt = ""

    def png(self, dpi: int = 120) -> bytes:
        """The figure as the bytes of a PNG file."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_: object) -> tuple[dict, dict]:
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.alt or "figure"}
        return data, {"image/png": {"alt": self.alt}}


def drawing(height: float, width: float = _WIDTH) -> Drawing:
    """An empty figure in the course's size and style (inches)."""
    return Drawing(figsize=(width, height), layout="constrained")


def headline(figure: Figure, title: str) -> None:
    """Write what happened above a figure, on two lines where one is too short."""
    figure.suptitle(textwrap.fill(title, 88), fontsize=_FONT + 1.5, x=0.01, ha="left")


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
        predicted: name → predicted peak in bytes; drawn as a diamond.
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
            axes.barh(row, width, left=left, height=0.62, color=PALETTE[column], edgecolor=edge, hatch=hatch, lw=0.6)
            if width * unit > 0.075 * largest:
                dark = column in ("parameters", "optimizer_state", "activations")
                axes.text(
                    left + width / 2, row, f"{width:,.3g}" if width < 1000 else f"{width:,.0f}",
                    ha="center", va="center", fontsize=_FONT - 2, color="white" if dark else "black",
                )  # fmt: skip
            left += width
        axes.text(left + 0.012 * largest / unit, row, format_bytes(totals[name]), va="center", fontsize=_FONT - 1)
        if predicted and predicted.get(name):
            axes.plot(predicted[name] / unit, row + 0.38, marker="^", color="black", ms=5, clip_on=False, zorder=5)
    if limit is not None:
        axes.axvline(limit / unit, color="black", lw=1.2, ls=(0, (4, 2)))
        axes.text(limit / unit, -0.62, f" budget {format_bytes(limit)}", fontsize=_FONT - 1, va="bottom", ha="center")
    axes.set_yticks(range(len(ledgers)), list(ledgers), fontsize=_FONT)
    axes.set_ylim(len(ledgers) - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * largest / unit)
    axes.set_xlabel(f"{unit_name} at the peak", fontsize=_FONT)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    style(axes).grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def legend(figure: Figure, ledgers: Sequence[Mapping[str, int]], predicted: bool = False) -> None:
    """One legend for the columns that occur (at 0.5 % of the largest total or more), below the figure."""
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
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], marker="^", color="black", ls="", ms=5, label="predicted peak"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 7), fontsize=_FONT - 1, frameon=False,
        handlelength=1.1, columnspacing=1.2, handletextpad=0.5,
    )  # fmt: skip


def stack(axes: Axes, measurement: Measurement, unit: int, top: float | None = None) -> None:
    """Draw one measurement's timeline: bytes by column over time, phases shaded, the peak marked."""
    ledger = measurement.ledger
    line = measurement.timeline.thin(900)
    seconds, phases = line.seconds, ledger.phases
    begin = (phases[0].start - ledger.start) / 1e9 if phases else seconds[0]
    end = (phases[-1].end - ledger.start) / 1e9 if phases else seconds[-1]
    margin = 0.03 * (end - begin) or 1e-6
    at = seconds - begin
    axes.stackplot(
        at, *[line.bytes[column] / unit for column in COLUMNS], step="post",
        colors=[PALETTE[column] for column in COLUMNS], linewidth=0, antialiased=False,
    )  # fmt: skip
    axes.set_xlim(-margin, end - begin + margin)
    top = top or 1.14 * measurement.peak_bytes / unit
    axes.set_ylim(0, top)
    style(axes)
    # A strip above the curve names the phases; the letters go only where they fit.
    for span in phases:
        left, right = ((moment - ledger.start) / 1e9 - begin for moment in (span.start, span.end))
        axes.axvspan(left, right, ymin=0.945, color=_PHASE_SHADES[span.kind], lw=0)
        axes.axvline(left, color="#AAAAAA", lw=0.5)
        if right - left > 0.055 * (end - begin):
            letters = span.kind if right - left > 0.16 * (end - begin) else _SHORT.get(span.kind, "")
            axes.text((left + right) / 2, 0.972 * top, letters, ha="center", va="center", fontsize=_FONT - 2.5)
    peak = (ledger.peak_time - ledger.start) / 1e9 - begin
    axes.plot(max(peak, -margin), measurement.peak_bytes / unit, "v", color="black", ms=4, clip_on=False, zorder=5)


def timeline(measurement: Measurement, title: str | None = None) -> Drawing:
    """One measurement's timeline by column: what was alive when, in forward, backward and the optimizer."""
    figure = drawing(3.0)
    axes = figure.subplots()
    unit, name = unit_for(measurement.peak_bytes)
    stack(axes, measurement, unit)
    axes.set_xlabel("seconds since the first step began", fontsize=_FONT)
    axes.set_ylabel(f"{name} alive", fontsize=_FONT)
    title = title or f"Peak {format_bytes(measurement.peak_bytes)}, in {measurement.phase}"
    headline(figure, title)
    legend(figure, [measurement.columns, *_all_columns(measurement)])
    figure.alt = f"Timeline of memory by column. {title}. At the peak: {_in_words(measurement.columns)}."
    return figure


def ledgers(
    columns: Mapping[str, Mapping[str, int]],
    title: str,
    predicted: Mapping[str, int | None] | None = None,
    limit: int | None = None,
) -> Drawing:
    """Ledgers as stacked bars on one axis, from plain numbers (name → bytes by column)."""
    figure = drawing(1.1 + 0.42 * len(columns))
    bars(figure.subplots(), columns, predicted, limit)
    headline(figure, title)
    legend(figure, list(columns.values()), bool(predicted and any(predicted.values())))
    figure.alt = f"{title}. " + " ".join(f"{name}: {_in_words(held)}." for name, held in columns.items())
    return figure


def comparison(compared: Comparison, title: str | None = None) -> Drawing:
    """The one figure of every notebook: ledgers on one axis with the predictions, timelines below on one axis."""
    variants = compared.variants
    # More than three timelines side by side cannot be read: the first and the last tell the story.
    timelines = variants if len(variants) <= 3 else [variants[0], variants[-1]]
    figure = drawing(3.4 + 0.4 * len(variants))
    grid = figure.add_gridspec(2, len(timelines), height_ratios=[0.55 + 0.42 * len(variants), 2.3])
    columns = {variant.name: variant.measurement.columns for variant in variants}
    predicted = {variant.name: variant.predicted_bytes for variant in variants}
    bars(figure.add_subplot(grid[0, :]), columns, predicted)
    largest = max(variant.measurement.peak_bytes for variant in variants)
    unit, unit_name = unit_for(largest)
    first: Axes | None = None
    for position, variant in enumerate(timelines):
        axes = figure.add_subplot(grid[1, position], sharey=first)
        stack(axes, variant.measurement, unit, top=1.14 * largest / unit)
        axes.set_title(variant.name, fontsize=_FONT, loc="left")
        axes.set_xlabel("seconds", fontsize=_FONT)
        if first is None:
            first = axes
            axes.set_ylabel(f"{unit_name} alive", fontsize=_FONT)
        else:
            axes.tick_params(labelleft=False)
    title = title or compared.verdict
    headline(figure, title)
    every = [m for variant in timelines for m in _all_columns(variant.measurement)]
    legend(figure, [*columns.values(), *every], any(predicted.values()))
    figure.alt = f"{title}. " + " ".join(f"{name}: {_in_words(held)}." for name, held in columns.items())
    return figure


def curves(
    lines: Mapping[str, Sequence[float] | tuple[Sequence[float], Sequence[float]]],
    title: str,
    x_label: str,
    y_label: str,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Drawing:
    """Lines with their names at the end, such as losses over steps: name → y values, or name → (x values, y values)."""
    figure = drawing(2.7)
    axes = style(figure.subplots())
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    dashes = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)), "-", "-", "-"]
    for number, (name, line) in enumerate(lines.items()):
        x, y = line if isinstance(line, tuple) else (range(1, len(line) + 1), line)
        look = {"color": colours[number % 7], "linestyle": dashes[number % 7], "linewidth": 1.5}
        axes.plot(x, y, label=name, marker="o" if len(y) <= 12 else None, ms=3.5, **look)
        if bands and name in bands:
            axes.fill_between(x, *bands[name], color=look["color"], alpha=0.15, lw=0)
    axes.set_xlabel(x_label, fontsize=_FONT)
    axes.set_ylabel(y_label, fontsize=_FONT)
    axes.legend(fontsize=_FONT - 1, frameon=False)
    headline(figure, title)
    figure.alt = f"{title}. Lines: {', '.join(lines)}; {y_label} against {x_label}."
    return figure


def _in_words(columns: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(columns[name])}" for name in COLUMNS if columns.get(name))


def _all_columns(measurement: Measurement) -> list[dict[str, int]]:
    """The most that each column ever held: a column can be large away from the peak."""
    return [{column: int(values.max()) if len(values) else 0} for column, values in measurement.timeline.bytes.items()]
