"""A run's steps: the peak of each, and what each left behind."""

from __future__ import annotations

from matplotlib.ticker import MaxNLocator

from memlab.figures.style import (
    FONT,
    PALETTE,
    Drawing,
    drawing,
    headline,
    style,
    title_height,
    unit_for,
)
from memlab.measurement import Measurement


def steps(measurement: Measurement, title: str | None = None) -> Drawing:
    """The peak of each step, and what is left after it: a creep is a line that rises.

    Args:
        measurement: what to draw. Steps that were not recorded in full are left out.
        title: what happened; by default the verdict.

    Returns:
        The figure.

    Raises:
        ValueError: no step was recorded in full, so there is nothing to draw.
    """
    full = [step for step in measurement.steps if step.peak_bytes is not None]
    if not full:
        raise ValueError("no step was recorded in full, so there is nothing to draw")
    title = title or measurement.verdict.sentence.split(", held by")[0]
    figure = drawing(2.4 + title_height(title))
    axes = style(figure.subplots())
    unit, name = unit_for(max(step.peak_bytes for step in full))

    numbers = [step.number for step in full]
    peaks = [step.peak_bytes / unit for step in full]
    left = [step.bytes_left / unit for step in full]
    size = 4 if len(full) <= 30 else 2
    axes.plot(numbers, peaks, "v-", color="black", lw=0.8, ms=size, label="peak of the step")
    axes.plot(numbers, left, "o-", color=PALETTE["kept"], lw=0.8, ms=size, label="left after it")

    axes.set_ylim(0, 1.12 * max(peaks))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", fontsize=FONT)
    axes.set_ylabel(name, fontsize=FONT)
    headline(figure, title)
    figure.legend(loc="outside lower center", ncols=2, fontsize=FONT - 1, frameon=False)
    figure.alt = (
        f"The steps of a run. {title.rstrip('.')}. The first one peaks at {peaks[0]:,.2f} {name}"
        f" and leaves {left[0]:,.2f}, the last one at {peaks[-1]:,.2f} {name} and leaves"
        f" {left[-1]:,.2f}."
    )
    return figure
