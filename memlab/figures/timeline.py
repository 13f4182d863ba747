"""One run's timeline: which bytes were alive when, by column, and which phase it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from memlab.figures.style import (
    FONT,
    PALETTE,
    WIDTH,
    Drawing,
    drawing,
    headline,
    in_words,
    legend,
    style,
    unit_for,
)
from memlab.ledger import COLUMNS, Ledger, Span, Timeline
from memlab.measurement import Measurement
from memlab.units import format_bytes

if TYPE_CHECKING:
    import numpy as np

_PHASE_SHADES = {"forward": "#F4F4F4", "backward": "#E4E4E4", "optimizer": "#CFCFCF"}
_SHORT = {"forward": "fwd", "backward": "bwd", "optimizer": "opt"}

# How wide a letter in the strip of phases is (inches).
_LETTER = 0.06


def timeline(measurement: Measurement, title: str | None = None) -> Drawing:
    """One measurement's timeline: what was alive when, in forward, backward and the optimizer.

    Args:
        measurement: what to draw.
        title: what happened; by default the peak and its phase.

    Returns:
        The figure.

    Raises:
        ValueError: nothing was allocated, so there is nothing to draw.
    """
    figure = drawing(3.0)
    axes = figure.subplots()
    unit, name = unit_for(measurement.peak_bytes)
    along = stack(axes, measurement, unit)
    since = along if measurement.is_predicted else f"{along} since the first step began"
    axes.set_xlabel(since, fontsize=FONT)
    axes.set_ylabel(f"{name} alive", fontsize=FONT)
    what = "Predicted peak" if measurement.is_predicted else "Peak"
    title = title or f"{what} {format_bytes(measurement.peak_bytes)}, in {measurement.phase}"
    headline(figure, title)
    legend(figure, [measurement.columns, *most_of_each(measurement)])
    at_peak = in_words(measurement.columns)
    figure.alt = f"Timeline of memory by column. {title}. At the peak: {at_peak}."
    return figure


def stack(
    axes: Axes,
    measurement: Measurement,
    unit: int,
    top: float | None = None,
    inches: float = 0.88 * WIDTH,
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
        The unit of the horizontal axis: seconds or, for a short run, milliseconds. A prediction has
        no time, and its axis no numbers: the operators stand in their order.

    Raises:
        ValueError: nothing was allocated, so there is nothing to draw.
    """
    if not measurement.peak_bytes:
        raise ValueError("the run allocated nothing on this device: there is no timeline to draw")

    ledger = measurement.ledger
    line = measurement.timeline.thin(900)
    time = _time_axis(ledger, line)
    # To the end of the axis: what is alive after the last event stays alive.
    moments = [*time.place(line.seconds), (time.length + time.margin) * time.scale]
    axes.stackplot(
        moments,
        *[[*line.bytes[column] / unit, line.bytes[column][-1] / unit] for column in COLUMNS],
        step="post",
        colors=[PALETTE[column] for column in COLUMNS],
        linewidth=0,
        antialiased=False,
    )
    axes.set_xlim(-time.margin * time.scale, (time.length + time.margin) * time.scale)
    axes.xaxis.set_major_locator(MaxNLocator(max(3, int(inches / 0.5)), steps=[1, 2, 5, 10]))
    top = top or 1.14 * measurement.peak_bytes / unit
    axes.set_ylim(0, top)
    style(axes)

    _strip(axes, ledger, time, top, inches)

    peak = max(time.place((ledger.peak_time - ledger.start) / 1e9), -time.margin * time.scale)
    height = measurement.peak_bytes / unit
    axes.plot(peak, height, "v", color="black", ms=4, clip_on=False, zorder=5)
    if measurement.is_predicted:
        axes.set_xticks([])
        return "operators in their order (predicted: no time)"
    return time.unit


class _TimeAxis(NamedTuple):
    """The horizontal axis: from the beginning of the first phase to the end of the last.

    `begin` (since the record began), `length` and the `margin` on both sides are in seconds; a
    second is `scale` of the axis's units.
    """

    begin: float
    length: float
    margin: float
    scale: int
    unit: str

    def place(self, seconds: np.ndarray | float) -> np.ndarray | float:
        """Where a moment, in seconds since the record began, stands on the axis."""
        return (seconds - self.begin) * self.scale


def _time_axis(ledger: Ledger, line: Timeline) -> _TimeAxis:
    if ledger.phases:
        begin = (ledger.phases[0].start - ledger.start) / 1e9
        end = (ledger.phases[-1].end - ledger.start) / 1e9
    else:
        begin, end = line.seconds[0], line.seconds[-1]
    length = end - begin
    margin = 0.03 * length or 1e-6
    scale, unit = (1, "seconds") if length >= 2 else (1000, "milliseconds")
    return _TimeAxis(begin, length, margin, scale, unit)


def _strip(axes: Axes, ledger: Ledger, time: _TimeAxis, top: float, inches: float) -> None:
    """Shade and name the phases in a strip above the curve; letters go only where they fit."""
    for phase in joined(ledger.phases):
        left = time.place((phase.start - ledger.start) / 1e9)
        right = time.place((phase.end - ledger.start) / 1e9)
        axes.axvspan(left, right, ymin=0.945, color=_PHASE_SHADES[phase.kind], lw=0)
        # The lines of many short phases would cover the curve.
        if right - left > 0.01 * time.length * time.scale:
            axes.axvline(left, color="#AAAAAA", lw=0.5)

        width = inches * (right - left) / time.scale / (time.length + 2 * time.margin)
        words = (phase.kind, _SHORT.get(phase.kind, ""))
        word = next((word for word in words if len(word) < width / _LETTER), "")
        middle = (left + right) / 2
        axes.text(middle, 0.972 * top, word, ha="center", va="center", fontsize=FONT - 2.5)


def joined(phases: Sequence[Span]) -> list[Span]:
    """Phases in time, with an optimizer's many small steps as one: each would be a line, and all
    together a bar.
    """
    spans: list[Span] = []
    for phase in phases:
        if spans and spans[-1].kind == phase.kind == "optimizer":
            spans[-1] = spans[-1]._replace(end=phase.end)
        else:
            spans.append(phase)
    return spans


def most_of_each(measurement: Measurement) -> list[dict[str, int]]:
    """For the legend: the most that each column ever held. It can be large away from the peak."""
    return [
        {column: int(values.max()) if len(values) else 0}
        for column, values in measurement.timeline.bytes.items()
    ]
