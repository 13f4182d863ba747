"""Ledgers as horizontal stacked bars on one axis, with predictions and a budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from memlab.figures.style import (
    EDGE,
    FONT,
    HATCH,
    PALETTE,
    in_words,
    lighten,
    style,
    unit_for,
    wrap,
)
from memlab.ledger import COLUMNS
from memlab.units import format_bytes

# Colours that take white letters.
_DARK = ("parameters", "optimizer_state", "activations")


def bars(
    axes: Axes,
    ledgers: Mapping[str, Mapping[str, int]],
    predicted: Mapping[str, int | None] | None = None,
    limit: int | None = None,
    outlined: Collection[str] = (),
) -> None:
    """Draw ledgers as horizontal stacked bars on one axis, the first on top.

    Args:
        axes: where to draw.
        ledgers: name → bytes by column.
        predicted: name → predicted peak in bytes, or None; drawn as a triangle below the bar,
            pointing at it.
        limit: a budget in bytes, drawn as a line.
        outlined: the names of ledgers that nobody measured: light bars with an outline.
    """
    marks = {name: (predicted or {}).get(name) or 0 for name in ledgers}
    totals = [sum(columns.values()) for columns in ledgers.values()]
    largest = max([*totals, *marks.values(), limit or 0, 1])
    unit, unit_name = unit_for(largest)

    for row, (name, columns) in enumerate(ledgers.items()):
        _bar(axes, row, columns, unit, largest, outlined=name in outlined)
        if marks[name]:
            place = (marks[name] / unit, row + 0.38)
            axes.plot(*place, marker="^", color="black", ms=5, clip_on=False, zorder=5)

    if limit is not None:
        _budget_line(axes, limit, unit)

    axes.set_yticks(range(len(ledgers)), [wrap(name, 28) for name in ledgers], fontsize=FONT)
    axes.set_ylim(len(ledgers) - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * largest / unit)
    axes.set_xlabel(f"{unit_name} at the peak", fontsize=FONT)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    style(axes).grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _bar(
    axes: Axes,
    row: int,
    columns: Mapping[str, int],
    unit: int,
    largest: int,
    *,
    outlined: bool = False,
) -> None:
    """One ledger's bar: a stretch for each column with its number, and the total behind it."""
    left = 0.0
    for column in COLUMNS:
        width = columns.get(column, 0) / unit
        if not width:
            continue

        axes.barh(
            row,
            width,
            left=left,
            height=0.62,
            color=lighten(PALETTE[column]) if outlined else PALETTE[column],
            edgecolor=PALETTE[column] if outlined else EDGE.get(column, "white"),
            hatch=None if outlined else HATCH.get(column),
            lw=1.2 if outlined else 0.6,
        )
        number = f"{width:,.0f}" if width >= 99.95 else f"{width:.3g}"
        fits = width * unit / largest > 0.02 + 0.015 * len(number)
        if fits:
            # In an outline of the bar's colour, so that a hatch or the budget's line does not
            # strike it through.
            axes.text(
                left + width / 2,
                row,
                number,
                ha="center",
                va="center",
                fontsize=FONT - 2,
                zorder=4,
                color="white" if column in _DARK and not outlined else "black",
                path_effects=[
                    withStroke(
                        linewidth=3,
                        foreground=lighten(PALETTE[column]) if outlined else PALETTE[column],
                    )
                ],
            )
        left += width

    axes.text(
        left + 0.012 * largest / unit,
        row,
        format_bytes(sum(columns.values())),
        va="center",
        fontsize=FONT - 1,
        zorder=4,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _budget_line(axes: Axes, limit: int, unit: int) -> None:
    axes.axvline(limit / unit, color="black", lw=1.2, ls=(0, (4, 2)), zorder=3)
    axes.text(
        limit / unit,
        -0.62,
        f"budget {format_bytes(limit)}",
        fontsize=FONT - 1,
        va="bottom",
        ha="center",
    )


def bars_in_words(
    title: str,
    ledgers: Mapping[str, Mapping[str, int]],
    predicted: Mapping[str, int | None] | None = None,
    limit: int | None = None,
) -> str:
    """The alternative text of a figure with bars: everything that they show.

    Args:
        title: the figure's.
        ledgers: as in `bars`, like `predicted` and `limit`.

    Returns:
        A sentence for the title, for each bar and for the budget.
    """
    sentences = [f"{title}."]
    for name, columns in ledgers.items():
        peak = format_bytes(sum(columns.values()))
        prediction = (predicted or {}).get(name)
        beside = f", predicted {format_bytes(prediction)}" if prediction else ""
        sentences.append(f"{name}: {peak}{beside} ({in_words(columns)}).")
    if limit is not None:
        sentences.append(f"The budget is {format_bytes(limit)}.")
    return " ".join(sentences)
