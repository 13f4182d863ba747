"""The capstone's recipe: one training loop, to which the techniques of the course are added, a line
each.

`LADDER` has the lines, `training` makes the run with some of them switched on, and `predict` says
what its peak should be:

>>> naive = measure(training())
>>> all_on = measure(training(*LADDER))
>>> moment, peak_bytes = predict(LADDER)
"""

from .formula import moments, predict
from .ladder import ALL, APPROXIMATE, EXACT, LADDER, RUNGS, Setting
from .loop import apply_techniques, far_zeros_of, make_optimizer, start, training

__all__ = [
    "ALL",
    "APPROXIMATE",
    "EXACT",
    "LADDER",
    "RUNGS",
    "Setting",
    "apply_techniques",
    "far_zeros_of",
    "make_optimizer",
    "moments",
    "predict",
    "start",
    "training",
]
