"""Predicted ledgers beside the memory of GPUs: outlined bars, cut off where they leave the page."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from memlab.figures.style import (
    FONT,
    PALETTE,
    Drawing,
    drawing,
    headline,
    in_words,
    lighten,
    style,
    title_height,
    unit_for,
)
from memlab.ledger import COLUMNS
from memlab.units import format_bytes

_BESIDE = "allocator and CUDA context"
_GREY = "#666666"


def predicted(
    ledgers: Mapping[str, Mapping[str, int]],
    needed: Mapping[str, int],
    lines: Mapping[str, int],
    title: str,
) -> Drawing:
    """Draw what runs would need, as outlined bars, and the memory of GPUs as lines.

    The axis ends behind the last line. A longer bar is cut off there, and its number says so.

    Args:
        ledgers: name → bytes by column, predicted.
        needed: name → bytes that the process needs: the ledger's, and what CUDA's allocator and
            context hold beside it.
        lines: a GPU's name → its memory in bytes; at least one.
        title: what the figure shows.

    Returns:
        The figure.
    """
    unit, unit_name = unit_for(max(lines.values()))
    end = 1.08 * max(lines.values())
    figure = drawing(1.35 + 0.27 * len(ledgers) + title_height(title))
    axes = style(figure.subplots())

    for row, (name, columns) in enumerate(ledgers.items()):
        beside = max(0, needed[name] - sum(columns.values()))
        _bar(axes, row, columns, beside, end, unit)
        _number(axes, row, needed[name], end, unit)
    for number, (gpu, memory) in enumerate(sorted(lines.items(), key=lambda line: line[1])):
        axes.axvline(memory / unit, color="black", lw=1.1, ls=(0, (4, 2)), zorder=3)
        # Two cards that are near each other: the smaller one's name stands to the left.
        side = "right" if number == 0 else "left"
        axes.text(memory / unit, -0.7, gpu, fontsize=FONT - 1, va="bottom", ha=side)

    axes.set_yticks(range(len(ledgers)), list(ledgers), fontsize=FONT - 0.5)
    axes.set_ylim(len(ledgers) - 0.4, -0.7)
    axes.set_xlim(0, 1.16 * end / unit)
    axes.set_xlabel(f"{unit_name} that the process needs at its peak, predicted", fontsize=FONT)
    axes.xaxis.set_major_locator(MaxNLocator(9))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    headline(figure, title)
    _legend(figure, ledgers)
    figure.alt = _words(title, ledgers, needed, lines)
    return figure


def _bar(
    axes: Axes, row: int, columns: Mapping[str, int], beside: int, end: float, unit: int
) -> None:
    left = 0
    stretches = [(PALETTE[column], columns.get(column, 0)) for column in COLUMNS]
    for colour, count in [*stretches, (_GREY, beside)]:
        right = min(left + count, end)
        if right > left:
            face = "none" if colour == _GREY else lighten(colour)
            place = {"left": left / unit, "height": 0.62}
            axes.barh(row, (right - left) / unit, color=face, edgecolor=colour, lw=1.1, **place)
        left += count


def _number(axes: Axes, row: int, needed: int, end: float, unit: int) -> None:
    """What is needed, behind the bar; an arrow where the bar is cut off."""
    arrow = "→ " if needed > end else ""
    axes.text(
        min(needed, end) / unit + 0.008 * end / unit,
        row,
        f"{arrow}{needed / unit:,.1f}" if needed < 100 * unit else f"{arrow}{needed / unit:,.0f}",
        fontsize=FONT - 1,
        va="center",
        zorder=4,
        # So that a GPU's line does not strike it through.
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def _legend(figure: Drawing, ledgers: Mapping[str, Mapping[str, int]]) -> None:
    seen = [
        column
        for column in COLUMNS
        if any(
            columns.get(column, 0) >= 0.01 * sum(columns.values()) for columns in ledgers.values()
        )
    ]
    handles = [
        Patch(
            facecolor=lighten(PALETTE[column]),
            edgecolor=PALETTE[column],
            label=column.replace("_", " "),
        )
        for column in seen
    ]
    handles.append(Patch(facecolor="none", edgecolor=_GREY, label=_BESIDE))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=(len(handles) + 1) // 2 if len(handles) > 5 else len(handles),
        fontsize=FONT - 1,
        frameon=False,
        handlelength=1.1,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _words(
    title: str,
    ledgers: Mapping[str, Mapping[str, int]],
    needed: Mapping[str, int],
    lines: Mapping[str, int],
) -> str:
    sentences = [f"{title}. All predicted."]
    for name, columns in ledgers.items():
        sentences.append(f"{name}: {format_bytes(needed[name])} ({in_words(columns)}).")
    cards = ", ".join(f"{gpu} has {format_bytes(memory)}" for gpu, memory in lines.items())
    return " ".join([*sentences, f"Lines: {cards}."])
