"""Will it fit? Models from 124M to 70B against the memory of well-known GPUs, all predicted.

It is what notebooks/electives/e8_will_it_fit.ipynb shows.

- *rows*: the predictions that are kept, in `predictions.json`, and how they are made;
- *tables*: the figure, the table and the card that are made of them;
- *form*: a form in a notebook that predicts what is chosen;
- *check*: the exercises, with the fewest switches that make a model fit.
"""

from memlab.will_it_fit.check import check_estimate, check_switches, guess
from memlab.will_it_fit.form import form
from memlab.will_it_fit.rows import GPUS, MODELS, Options, Row, Rows, load, predict_row
from memlab.will_it_fit.tables import card, lines, verdicts

__all__ = [
    "GPUS",
    "MODELS",
    "Options",
    "Row",
    "Rows",
    "card",
    "check_estimate",
    "check_switches",
    "form",
    "guess",
    "lines",
    "load",
    "predict_row",
    "verdicts",
]
