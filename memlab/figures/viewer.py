"""A run's blocks one by one, as PyTorch's memory viewer (pytorch.org/memory_viz) stacks them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from memlab.figures.style import (
    FONT,
    PALETTE,
    Drawing,
    drawing,
    headline,
    legend,
    style,
    unit_for,
)
from memlab.figures.timeline import most_of_each
from memlab.ledger import Block
from memlab.measurement import Measurement
from memlab.units import format_bytes

#: A block below this part of the peak is drawn with the other small ones, as one band.
SMALLEST = 0.004
SMALL_COLOUR = "#DDDDDD"


def viewer(measurement: Measurement, title: str | None = None) -> Drawing:
    """Draw each block as a band from the moment it was made to the moment it was given back.

    A band stands on the bands that were there before it. It falls when one below it goes. So does
    the viewer draw them; here they have the colours of their columns.

    Args:
        measurement: a run whose blocks were recorded.
        title: what is to be seen.

    Returns:
        The figure.

    Raises:
        ValueError: no block was recorded.
    """
    blocks = measurement.ledger.blocks
    if not blocks:
        raise ValueError("no block was recorded, so there is nothing to draw")
    limit = SMALLEST * measurement.peak_bytes
    large = sorted((b for b in blocks if b.bytes >= limit), key=lambda block: block.born)
    moments = np.unique([t for b in large for t in (b.born, b.died) if t is not None])

    figure = drawing(3.4)
    axes = figure.subplots()
    unit, name = unit_for(measurement.peak_bytes)
    small = _bytes_at(moments, [block for block in blocks if block.bytes < limit])
    _band(axes, np.arange(len(moments)), np.zeros(len(moments)), small / unit, SMALL_COLOUR)
    _stack(axes, large, moments, small, unit)

    if small.max() > measurement.peak_bytes / 10:
        middle = len(moments) // 2
        axes.text(middle, small[middle] / unit / 4, "many small tensors", fontsize=FONT)
    style(axes)
    axes.set_xlim(0, len(moments))
    axes.set_xlabel("allocations and frees, one after the other", fontsize=FONT)
    axes.set_ylabel(f"{name} alive", fontsize=FONT)
    title = title or "Each band is one tensor: wide bands are kept long, high ones are large"
    headline(figure, title)
    legend(figure, [measurement.columns, *most_of_each(measurement)])
    largest = max(large, key=lambda block: block.bytes)
    figure.alt = (
        f"Memory by single tensors, as PyTorch's memory viewer shows it. {title}. {len(large)}"
        f" bands; the largest has {format_bytes(largest.bytes)}, from {largest.operator}."
    )
    return figure


def _bytes_at(moments: np.ndarray, blocks: Sequence[Block]) -> np.ndarray:
    """The bytes of these blocks that are alive at each moment."""
    alive = np.zeros(len(moments))
    for block in blocks:
        alive[_life(moments, block)] += block.bytes
    return alive


def _life(moments: np.ndarray, block: Block) -> slice:
    end = len(moments) if block.died is None else int(np.searchsorted(moments, block.died))
    return slice(int(np.searchsorted(moments, block.born)), end)


def _stack(
    axes: Axes, blocks: Sequence[Block], moments: np.ndarray, ground: np.ndarray, unit: int
) -> None:
    """Draw the blocks in the order of their births, each on those before it."""
    below = ground / unit
    for block in blocks:
        life = _life(moments, block)
        position = np.arange(life.start, life.stop + 1)
        bottom = np.append(below[life], below[life][-1:])
        _band(axes, position, bottom, block.bytes / unit, PALETTE[block.column])
        below[life] += block.bytes / unit


def _band(
    axes: Axes, position: np.ndarray, bottom: np.ndarray, height: object, colour: str
) -> None:
    axes.fill_between(
        position,
        bottom,
        bottom + height,
        step="post",
        facecolor=colour,
        edgecolor="white",
        linewidth=0.4,
    )
