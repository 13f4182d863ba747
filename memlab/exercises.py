"""Exercises: a budget that is enforced, gradients that have to be the same, and a picture of what
happened.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from memlab import figures
from memlab.budget import budget as budget_of
from memlab.budget import bytes_alive, resolve_device
from memlab.ledger import COLUMNS
from memlab.measure import measure, watch
from memlab.proof import FirstStep, first_step, gradient_difference, never_updated
from memlab.units import MiB, format_bytes, parse_bytes

#: Every result of `check` in this process, in order. The course's own tests read it.
history: list[Result] = []


@dataclass
class Result:
    """Whether an exercise is solved, why (not), and the ledgers of the reference and of
    the answer.
    """

    passed: bool
    lines: list[str]
    ledgers: dict[str, dict[str, int]] = field(default_factory=dict)
    limit: int | None = None

    def __str__(self) -> str:
        return "\n".join(self.lines)

    __repr__ = __str__

    def plot(self) -> figures.Drawing:
        """The answer's ledger beside the reference's, with the budget as a line."""
        return figures.ledgers(self.ledgers, self.lines[0], limit=self.limit)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        print(self)
        if self.ledgers:
            display(self.plot())


def check(
    build: Callable | None,
    *,
    reference: Callable,
    budget: int | str,
    max_compute: float = 1.5,
    min_compute: float = 0.97,
    tolerance: float = 1e-4,
    steps: int = 2,
    device: str | torch.device | None = None,
) -> Result:
    """Check an answer: does it fit the budget, are its gradients the reference's, what does it
    cost?

    The gradients are those of the first step. Whatever the answer itself raises reaches the learner
    as it is.

    Args:
        build: the learner's answer, a function as for `memlab.measure`; None or `...` (or a
            function that returns one of them) as long as there is none.
        reference: the run whose gradients count, and which does not fit the budget.
        budget: the most bytes allowed at once ("60 MiB"), counted from zero for the answer. It is
            enforced.
        max_compute: the most floating-point operations allowed, as a multiple of the reference's.
            Operations rather than seconds: they are the same on a busy machine.
        min_compute: the least, likewise: an answer that computes less has left a part of the task
            out. Lower it where computing less is the point.
        tolerance: the largest relative difference allowed between the gradients.
        steps: how many steps are run.
        device: as for `memlab.measure`.

    Raises:
        ValueError: the reference itself meets the budget, so there would be nothing to do; the
            answer cannot be measured, because it returns no step, for one.
    """
    limits = (parse_bytes(budget), min_compute, max_compute, tolerance)
    result = _check(build, reference, *limits, steps, resolve_device(device))
    history.append(result)
    return result


def _check(
    build: Callable | None,
    reference: Callable,
    limit: int,
    min_compute: float,
    max_compute: float,
    tolerance: float,
    steps: int,
    device: torch.device,
) -> Result:
    before = measure(reference, steps=steps, device=device)
    if before.peak_bytes <= limit:
        raise ValueError(
            f"the reference needs {format_bytes(before.peak_bytes)} and meets the budget of"
            f" {format_bytes(limit)} already: there is nothing to do"
        )
    ledgers = {"as it is": before.columns}
    if build is None or build is ... or _returns_nothing(build):
        line = (
            f"Not solved yet: {format_bytes(before.peak_bytes)} has to become {format_bytes(limit)}"
        )
        return Result(False, [line], ledgers, limit)

    with watch(device=device) as watched:
        pass
    # A GPU's allocator reserves in segments, and parts of them stay empty. So there the budget only
    # ends a run that is far off; what counts is what was allocated.
    room = limit if device.type == "cpu" else limit + limit // 4 + 64 * MiB
    try:
        with budget_of(bytes_alive(device) + room, device=device):
            after = measure(build, steps=steps, device=device)
    except torch.OutOfMemoryError as error:
        columns = getattr(error, "columns", None)
        if not columns:  # the device itself is full
            raise
        where, columns = _ran_out(error, columns, watched.measurement.columns)
        ledgers["yours, when it ran out"] = columns
        largest = max(COLUMNS, key=lambda column: columns[column])
        lines = [
            f"Over the budget of {format_bytes(limit)}",
            f"It ran out here: {where}.",
            (
                f"The largest column is {largest.replace('_', ' ')}. The hint below says where to"
                " look."
            ),
        ]
        return Result(False, lines, ledgers, limit)
    ledgers["yours"] = after.columns
    if after.peak_bytes > limit:  # only where there was more room than the budget
        largest = max(COLUMNS, key=lambda column: after.columns[column])
        lines = [
            (
                f"Over the budget of {format_bytes(limit)}: {format_bytes(after.peak_bytes)} at the"
                f" peak, in {after.phase}"
            ),
            (
                f"The largest column is {largest.replace('_', ' ')}. The hint below says where to"
                " look."
            ),
        ]
        return Result(False, lines, ledgers, limit)

    wanted, wanted_by_python = _first_step_traced(reference)
    given, given_by_python = _first_step_traced(build)
    hidden = max(
        given_by_python - wanted_by_python, after.outside_memory_bytes - before.outside_memory_bytes
    )
    if hidden > MiB:
        line = (
            f"It fits, but it holds {format_bytes(hidden)} where the meter does not count, in"
            " NumPy's arrays for one"
        )
        return Result(False, [line], ledgers, limit)
    problem = _wrong_gradients(wanted, given, tolerance)
    if problem:
        return Result(
            False, ["It fits, but it does not train the same model", problem], ledgers, limit
        )
    compute = given.flops / wanted.flops if wanted.flops else 1.0
    if compute < min_compute:
        line = (
            f"It fits, but it computes only {compute:.2f}× as much: a part of the task is missing"
        )
        return Result(False, [line], ledgers, limit)
    if compute > max_compute:
        line = f"It fits, but it computes {compute:.2f}× as much; {max_compute:g}× is allowed"
        return Result(False, [line], ledgers, limit)
    lines = [
        (
            f"Solved: {format_bytes(before.peak_bytes)} → {format_bytes(after.peak_bytes)}, budget"
            f" {format_bytes(limit)}"
        ),
        (
            f"Largest gradient difference {gradient_difference(wanted, given):.1e} (allowed"
            f" {tolerance:.0e}), {compute:.2f}× the floating-point operations (allowed"
            f" {max_compute:g}×)."
        ),
    ]
    return Result(True, lines, ledgers, limit)


def _first_step_traced(build: Callable) -> tuple[FirstStep, int]:
    """A run's first step, and the most bytes that Python and NumPy held in it beside
    the tensors.
    """
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        step = first_step(build)
        return step, tracemalloc.get_traced_memory()[1] - before
    finally:
        if not running:
            tracemalloc.stop()


def _returns_nothing(build: Callable) -> bool:
    """Whether an answer is still empty: `build()` gives None or `...`."""
    step = build()
    return step is None or step is ...


def _ran_out(
    error: Exception, columns: dict[str, int], before: dict[str, int]
) -> tuple[str, dict[str, int]]:
    """Where an answer ran out, and its own bytes by column: the budget's error counts what was
    alive before, too.
    """
    where = str(error).splitlines()[0].partition(". ")[2]
    if (
        "at the measured peak" in where
    ):  # found afterwards, by the ledger: that has the answer's bytes alone
        return where.partition(": ")[0], columns
    where = where.partition(" while ")[0].rstrip(".")
    return where, {column: max(0, columns[column] - before[column]) for column in COLUMNS}


def _wrong_gradients(wanted: FirstStep, given: FirstStep, tolerance: float) -> str | None:
    if not given.gradients:
        return (
            "No parameter has a gradient: the step has to call backward and let the optimizer step."
        )
    try:
        difference = gradient_difference(wanted, given)
    except ValueError as error:
        return f"{error}."
    if difference > tolerance:
        return f"The largest gradient difference is {difference:.1e}; {tolerance:.0e} is allowed."
    stale = never_updated(wanted, given)
    if stale:
        return (
            f"The step leaves {len(stale)} of {len(wanted.updated)} parameters as they are"
            f" ({stale[0]})."
        )
    return None


def guess(mebibytes: float | None, measured: int, what: str = "the peak") -> None:
    """Print how far a learner's prediction (in MiB, None if not made yet) is from what was measured
    (bytes).
    """
    if mebibytes is None:
        print(
            f"You have not predicted {what} yet: write a number of MiB above and run the cells"
            " again."
        )
        return
    off = mebibytes * MiB / measured - 1
    words = (
        "spot on"
        if abs(off) < 0.02
        else "close"
        if abs(off) < 0.10
        else "worth a second look at the formula"
    )
    print(
        f"You predicted {mebibytes:,.1f} MiB for {what}; measured {format_bytes(measured)}:"
        f" {off:+.1%}, {words}."
    )
