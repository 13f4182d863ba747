"""Whole figures, from plain numbers or measurements: ledgers, ladders, comparisons, curves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile

from matplotlib.ticker import MaxNLocator

from memlab.figures.bars import bars, bars_in_words
from memlab.figures.style import (
    FONT,
    WIDTH,
    Drawing,
    drawing,
    headline,
    legend,
    style,
    title_height,
    unit_for,
    wrap,
)
from memlab.figures.timeline import most_of_each, stack
from memlab.measurement import Measurement
from memlab.units import MiB

# The lines of `curves` and the series of `trade`, in turn.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)), "-", "-", "-")
_SERIES_COLOURS = ("#666666", "#0072B2", "#D55E00")


def ledgers(
    columns: Mapping[str, Mapping[str, int]],
    title: str,
    predicted: Mapping[str, int | None] | None = None,
    limit: int | None = None,
) -> Drawing:
    """Ledgers as stacked bars on one axis, from plain numbers.

    Args:
        columns: name → bytes by column.
        title: what happened.
        predicted: name → predicted peak in bytes, or None.
        limit: a budget in bytes, drawn as a line.

    Returns:
        The figure.
    """
    budget_height = 0.2 if limit is not None else 0.0
    figure = drawing(1.2 + 0.42 * len(columns) + budget_height + title_height(title))
    bars(figure.subplots(), columns, predicted, limit)
    headline(figure, title)
    legend(figure, list(columns.values()), bool(predicted and any(predicted.values())))
    figure.alt = bars_in_words(title, columns, predicted, limit)
    return figure


def ladder(
    columns: Mapping[str, Mapping[str, int]],
    title: str,
    predicted: Mapping[str, int | None] | None = None,
) -> Drawing:
    """Ledgers that shrink step by step, the first on top. The small ones are drawn once more,
    enlarged.

    Args:
        columns: name → bytes by column.
        title: what happened.
        predicted: name → predicted peak in bytes, or None.

    Returns:
        The figure.
    """
    small = _small_rungs(columns)
    parts = [columns, small] if small else [columns]
    heights = [1 + 0.27 * len(rungs) for rungs in parts]
    figure = drawing(0.6 + sum(heights) + title_height(title))
    places = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for place, rungs in zip(places, parts, strict=True):
        bars(place.subplots(), rungs, predicted)
    if small:
        enlarged = places[1].axes[0]
        enlarged.set_title(f"The last {len(small)} of them, enlarged", fontsize=FONT, loc="left")
    headline(figure, title)
    legend(figure, list(columns.values()), bool(predicted and any(predicted.values())))
    figure.alt = bars_in_words(title, columns, predicted)
    return figure


def _small_rungs(columns: Mapping[str, Mapping[str, int]]) -> dict[str, Mapping[str, int]]:
    """The last rungs, from where on none is above an eighth of the largest.

    None where that is one alone, which shows no difference, and where it is all of them.
    """
    totals = {name: sum(rung.values()) for name, rung in columns.items()}
    bound = max(totals.values(), default=0) / 8
    small = list(takewhile(lambda name: totals[name] <= bound, reversed(totals)))
    if not 1 < len(small) < len(columns):
        return {}
    return {name: columns[name] for name in reversed(small)}


def comparison(
    measurements: Mapping[str, Measurement],
    title: str,
    predicted: Mapping[str, int | None] | None = None,
) -> Drawing:
    """The one figure of every notebook: ledgers on one axis with the predictions, timelines below
    on one axis.

    Args:
        measurements: name → what to draw, at least one.
        title: what happened.
        predicted: name → predicted peak in bytes, or None.

    Returns:
        The figure.

    Raises:
        ValueError: a run allocated nothing, so there is nothing to draw.
    """
    figure = drawing(3.4 + 0.4 * len(measurements))
    # Two figures in one, so that long names beside the bars take no room from the timelines.
    heights = [0.75 + 0.42 * len(measurements), 2.3]
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    columns = {name: measurement.columns for name, measurement in measurements.items()}
    outlined = [name for name, found in measurements.items() if found.is_predicted]
    bars(above.subplots(), columns, predicted, outlined=outlined)

    # More than three timelines side by side cannot be read: the first and the last tell the story.
    names = list(measurements)
    shown = names if len(names) <= 3 else [names[0], names[-1]]
    largest = max(measurement.peak_bytes for measurement in measurements.values())
    unit, unit_name = unit_for(largest)
    top = 1.14 * largest / unit
    inches = (0.92 * WIDTH - 0.1) / len(shown) - 0.1
    row = below.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, name in zip(row, shown, strict=True):
        time_unit = stack(axes, measurements[name], unit, top, inches)
        axes.set_title(wrap(name, 84 // len(shown)), fontsize=FONT, loc="left")
        axes.set_xlabel(time_unit, fontsize=FONT)
    row[0].set_ylabel(f"{unit_name} alive", fontsize=FONT)

    headline(figure, title)
    most = [held for name in shown for held in most_of_each(measurements[name])]
    legend(figure, [*columns.values(), *most], bool(predicted and any(predicted.values())))
    figure.alt = bars_in_words(title, columns, predicted)
    return figure


def curves(
    lines: Mapping[str, Sequence[float] | tuple[Sequence[float], Sequence[float]]],
    title: str,
    x_label: str,
    y_label: str,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    points: Collection[str] = (),
) -> Drawing:
    """Lines, such as losses over steps.

    Args:
        lines: name → y values (at 1, 2, ...), or name → (x values, y values).
        title: what happened.
        x_label: what the x values are, with their unit.
        y_label: what the y values are, with their unit.
        bands: name → (lower values, upper values): shades that range around a line.
        points: names that are drawn as points alone, where nothing was measured between them.

    Returns:
        The figure.
    """
    figure = drawing(2.7)
    axes = style(figure.subplots())
    every_x, ends = [], []
    for number, (name, line) in enumerate(lines.items()):
        x, y = line if isinstance(line, tuple) else (range(1, len(line) + 1), line)
        every_x.extend(x)
        ends.append(f"{name} from {y[0]:,.4g} to {y[-1]:,.4g}")
        colour = _COLOURS[number % len(_COLOURS)]
        dashes = _DASHES[number % len(_DASHES)]
        marker = "o" if len(y) <= 12 or name in points else None
        if name in points:
            dashes = ""
        axes.plot(x, y, label=name, marker=marker, ms=3.5, color=colour, ls=dashes, lw=1.5)
        if bands and name in bands:
            axes.fill_between(x, *bands[name], color=colour, alpha=0.15, lw=0)

    whole = all(float(value).is_integer() for value in every_x)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=whole))
    axes.set_xlabel(x_label, fontsize=FONT)
    axes.set_ylabel(y_label, fontsize=FONT)
    axes.legend(fontsize=FONT - 1, frameon=False)
    headline(figure, title)
    figure.alt = f"{title}. {y_label} against {x_label}: {'; '.join(ends)}."
    return figure


def trade(
    series: Mapping[str, Mapping[str, tuple[int, float]]],
    title: str,
    base: tuple[int, float],
    unlabelled: Collection[str] = (),
) -> Drawing:
    """What bytes cost in time. Down and to the left is less memory in less time.

    Both axes are logarithmic. Seconds are drawn in times those of `base`, whose lines part the
    figure in four.

    Args:
        series: name → name of a point → (bytes at the peak, seconds of a step).
        title: what happened.
        base: (bytes, seconds) of what all is held against.
        unlabelled: the names of points that are drawn without them.

    Returns:
        The figure.
    """
    figure = drawing(4.6)
    axes = style(figure.subplots())
    axes.axhline(1, color="#666666", linewidth=0.8)
    axes.axvline(base[0] / MiB, color="#666666", linewidth=0.8)
    words = []
    for number, (name, points) in enumerate(series.items()):
        colour = _SERIES_COLOURS[number % len(_SERIES_COLOURS)]
        # The first series' labels below the points: they would cover others.
        offset = (4, 4) if number else (4, -11)
        letters = {"textcoords": "offset points", "fontsize": FONT - 2, "color": colour}
        places = {label: (size / MiB, s / base[1]) for label, (size, s) in points.items()}
        x = [place[0] for place in places.values()]
        y = [place[1] for place in places.values()]
        axes.plot(x, y, marker="o", ms=4, linewidth=1.2, color=colour, label=name)
        for label, place in places.items():
            words.append(f"{label} {place[0]:,.0f} MiB, {place[1]:.2f} × the time")
            if label not in unlabelled:
                axes.annotate(label, place, offset, **letters)

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("MiB at the peak", fontsize=FONT)
    axes.set_ylabel("× time", fontsize=FONT)
    figure.legend(fontsize=FONT - 1, frameon=False, loc="outside lower center", ncols=3)
    headline(figure, title)
    figure.alt = f"{title}. {'; '.join(words)}."
    return figure
