"""Records: what the notebooks measured and the claims they tested, kept in files.

A results file is one JSON object, one file for each kind of device (`results/cpu.json`,
`results/nvidia-h200.json`):

    schema       the version of this form, 2 (1 had no column `kept`)
    environment  device, gpu, gpu_bytes, torch, driver, python, threads, commit, date
    records      one for each comparison: notebook, technique, scale, sizes, variants
    claims       one for each claim that a notebook tested: notebook, number, says, verdict, found

In Python they are `Results`, `Environment`, `Record` and `Claim` (`memlab/results/models.py`). A
notebook that is run again replaces its own records only: in the file, a record that stays from an
earlier run carries an `environment` of its own, which holds what differs from the file's.

`results/lessons/` has the same for the lessons, which are no part of the benchmark, and what is
predicted for their cards (`memlab/results/lessons.py`).

`results/predictions.json` is no results file: it has what was predicted for a GPU's records,
without the GPU (`make validate`).
"""

from memlab.results.environments import commit, environment
from memlab.results.files import file_name, load, load_all, merge, replace, write
from memlab.results.models import Claim, Environment, Record, Results, Seconds, Variant
from memlab.results.predictions import (
    PREDICTIONS,
    Bytes,
    Left,
    Predictions,
    Row,
    Summary,
    load_predictions,
    summary_of,
    write_predictions,
)
from memlab.results.records import VARIABLE, claim, read_lines, record

__all__ = [
    "PREDICTIONS",
    "VARIABLE",
    "Bytes",
    "Claim",
    "Environment",
    "Left",
    "Predictions",
    "Record",
    "Results",
    "Row",
    "Seconds",
    "Summary",
    "Variant",
    "claim",
    "commit",
    "environment",
    "file_name",
    "load",
    "load_all",
    "load_predictions",
    "merge",
    "read_lines",
    "record",
    "replace",
    "summary_of",
    "write",
    "write_predictions",
]
