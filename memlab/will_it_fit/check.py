"""The lesson's checks: a guess, an estimate in a few lines, and the fewest switches that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from memlab import exercises, figures
from memlab.meters.gpus import find_gpu
from memlab.units import GiB, format_bytes
from memlab.will_it_fit.rows import (
    EXERCISE_MODEL,
    EXERCISE_SEQUENCE,
    GPUS,
    SWITCHES,
    Options,
    Row,
    Rows,
    predict_row,
)
from memlab.will_it_fit.tables import on_the_lines
from memlab.workloads.geometries import LanguageGeometry, find_geometry

#: How far an estimate in the head may be off.
TOLERANCE = 0.15


@dataclass
class Fitting(exercises.Result):
    """Whether the exercise is solved, and the rows that its figure shows."""

    rows: dict[str, Row] = field(default_factory=dict)
    gpu: str = GPUS["24 GB"]

    def __post_init__(self) -> None:
        self.ledgers = {name: row.columns for name, row in self.rows.items()}

    def plot(self) -> figures.Drawing:
        """What is predicted for the answer beside the run without switches, and the GPU's line."""
        return figures.predicted(
            {name: row.columns for name, row in self.rows.items()},
            {name: row.needed_bytes[self.gpu] for name, row in self.rows.items()},
            {self.gpu: find_gpu(self.gpu).memory_bytes},
            self.lines[0],
        )


def guess(gibibytes: float | None, predicted: int) -> None:
    """Print how far a reader's guess is from what is predicted.

    Args:
        gibibytes: the guess in GiB, None if there is none yet.
        predicted: bytes.
    """
    if gibibytes is None:
        print("You have not guessed yet: write a number of GiB above and run the cells again.")
        return
    off = gibibytes * GiB / predicted - 1
    words = "close" if abs(off) < TOLERANCE else "see below which term is missing"
    size = format_bytes(predicted)
    print(f"You guessed {gibibytes:.1f} GiB; predicted {size}: {off:+.0%}, {words}.")


def check_estimate(
    estimate: Callable[[LanguageGeometry, bool, int], float | None] | None, rows: Rows
) -> exercises.Result:
    """Check an estimate of the peak against the predictions of every model.

    Args:
        estimate: the learner's answer, from a model's sizes, whether it is a LoRA, and the tokens
            of a step, to bytes; None, or a function that returns None, as long as there is none.
        rows: the predictions that are kept.
    """
    kept = on_the_lines(rows)
    lines, passed = [], True
    for row in kept:
        options = row.options
        bytes_ = None
        if estimate is not None:
            bytes_ = estimate(find_geometry(options.model), options.lora, options.sequence)
        if bytes_ in (None, ...):
            line = f"Not solved yet: {len(kept)} predictions wait for your estimate"
            return _kept(exercises.Result(False, [line]))
        off = bytes_ / row.allocated_bytes - 1
        passed &= abs(off) <= TOLERANCE
        way = "LoRA" if options.lora else "full"
        lines.append(
            f"{options.model:<13} {way:<4} {format_bytes(int(bytes_)):>12} estimated"
            f" {format_bytes(row.allocated_bytes):>12} predicted  {off:+.0%}"
        )
    verdict = "Solved: each within" if passed else "Not all are within"
    return _kept(exercises.Result(passed, [f"{verdict} {TOLERANCE:.0%}", *lines]))


def check_switches(
    switches: Iterable[str] | None,
    rows: Rows,
    predict_row: Callable[[Options], Row] = predict_row,
) -> Fitting:
    """Check whether the exercise's model fits 24 GB with these switches, and with fewer.

    A set of switches that is not kept is predicted now.

    Args:
        switches: names of `SWITCHES`; none as long as there is no answer.
        rows: the predictions that are kept.
        predict_row: what predicts.

    Raises:
        ValueError: there is no such switch.
    """
    names = () if switches in (None, ...) else tuple(dict.fromkeys(switches))
    if unknown := [name for name in names if name not in SWITCHES]:
        raise ValueError(f"there is no switch {unknown[0]!r}. There are: {', '.join(SWITCHES)}")
    task = {"model": EXERCISE_MODEL, "sequence": EXERCISE_SEQUENCE}
    gpu = GPUS["24 GB"]
    before = rows.find(**task)
    shown = {"no switch": before}
    if not names:
        line = f"Not solved yet: {EXERCISE_MODEL} {before.fits(gpu)}"
        return _kept(Fitting(False, [line], rows=shown))
    options = Options(**task, **dict.fromkeys(names, True))
    row = rows.find(**dict(options)) or predict_row(options)
    shown["yours"] = row
    fit = row.fits(gpu)
    fewer = [
        kept
        for kept in rows.with_model(**task)
        if len(kept.options.switches) < len(names) and kept.fits(gpu)
    ]
    if not fit:
        largest = max(row.columns, key=row.columns.get).replace("_", " ")
        lines = [f"Not yet: it {fit}", f"The peak is in {row.phase}; its largest column: {largest}"]
    elif fewer:
        lines = [f"It {fit}", f"{len(fewer[0].options.switches)} switches are enough"]
    else:
        lines = [f"Solved: it {fit}"]
    return _kept(Fitting(bool(fit) and not fewer, lines, rows=shown))


def _kept(result: exercises.Result) -> exercises.Result:
    exercises.history.append(result)
    return result
