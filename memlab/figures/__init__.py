"""The figures: ledgers as stacked bars on one axis, timelines by column. One palette, everywhere.

Every figure carries an alternative text and its title says what happened.

- *style*: the palette, the picture that shows itself, title, legend and units;
- *bars*: ledgers as stacked bars on one axis;
- *timeline*: what was alive when;
- *viewer*: single blocks, as PyTorch's memory viewer has them;
- *predicted*: predicted ledgers beside the memory of GPUs;
- *compound*: whole figures, made of these: ledgers, a ladder, a comparison; and plain curves.
"""

from memlab.figures.bars import bars
from memlab.figures.compound import comparison, curves, ladder, ledgers, trade
from memlab.figures.predicted import predicted
from memlab.figures.steps import steps
from memlab.figures.style import (
    PALETTE,
    Drawing,
    darken,
    drawing,
    headline,
    legend,
    style,
    unit_for,
)
from memlab.figures.timeline import stack, timeline
from memlab.figures.viewer import viewer

__all__ = [
    "PALETTE",
    "Drawing",
    "bars",
    "comparison",
    "curves",
    "darken",
    "drawing",
    "headline",
    "ladder",
    "ledgers",
    "legend",
    "predicted",
    "stack",
    "steps",
    "style",
    "timeline",
    "trade",
    "unit_for",
    "viewer",
]
