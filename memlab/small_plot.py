"""The steps of a run as a small picture beside its printed measurement: inline SVG, for light pages
and for dark ones.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from memlab.ledger import Step
from memlab.units import format_bytes

#: Fewer steps say nothing as a picture.
LEAST_STEPS = 3

#: That of the column `kept` in memlab's figures: it can be told on white and on black.
LEFT_COLOUR = "#CC79A7"

_WIDTH, _HEIGHT = 300, 60


def small_plot(steps: Sequence[Step]) -> str:
    """The peak of each step that was recorded in full, and what it left; nothing if there are fewer
    than three.

    Args:
        steps: all steps of the run.
    """
    full = [step for step in steps if step.peak_bytes is not None]
    if len(full) < LEAST_STEPS:
        return ""
    peaks = [step.peak_bytes for step in full]
    left = [step.bytes_left for step in full]
    numbers = [step.number for step in full]
    words = (
        f"Steps {numbers[0]} to {numbers[-1]}: the peak of each is at most"
        f" {format_bytes(max(peaks))}, and the last one leaves {format_bytes(left[-1])}."
    )
    lines = _line(numbers, peaks, max(peaks), "currentColor", "4 3")
    lines += _line(numbers, left, max(peaks), LEFT_COLOUR, "none")
    text = "fill='currentColor' font-size='11' font-family='sans-serif'"
    beside = (
        f"<text x='{_WIDTH + 10}' y='15' {text}>┄ peak of a step,"
        f" at most {format_bytes(max(peaks))}</text>"
        f"<text x='{_WIDTH + 10}' y='{_HEIGHT - 2}' {text}><tspan fill='{LEFT_COLOUR}'>●</tspan>"
        f" left after it, {format_bytes(left[-1])} at the end</text>"
        f"<text x='4' y='{_HEIGHT + 16}' {text}>step {numbers[0]}</text>"
        f"<text x='{_WIDTH}' y='{_HEIGHT + 16}' text-anchor='end' {text}>step {numbers[-1]}</text>"
    )
    axis = f"M4 4V{_HEIGHT}H{_WIDTH}"
    return (
        f"<svg role='img' width='540' height='{_HEIGHT + 22}' style='max-width:100%'"
        f" aria-label='{html.escape(words, quote=True)}'><title>{html.escape(words)}</title>"
        f"<path d='{axis}' fill='none' stroke='currentColor' stroke-opacity='0.4'/>"
        f"{lines}{beside}</svg>"
    )


def _line(
    numbers: Sequence[int], values: Sequence[int], highest: int, colour: str, dashes: str
) -> str:
    """A line from left to right; `highest` is at the top, and zero on the axis."""
    span = numbers[-1] - numbers[0]
    points = " ".join(
        f"{4 + (_WIDTH - 4) * (number - numbers[0]) / span:.1f},"
        f"{_HEIGHT - (_HEIGHT - 6) * value / max(highest, 1):.1f}"
        for number, value in zip(numbers, values, strict=True)
    )
    return (
        f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='1.6'"
        f" stroke-dasharray='{dashes}' stroke-linejoin='round'/>"
    )
