"""Exercises: a budget that is enforced, gradients that have to be the same, and a picture of what
happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from memlab import figures
from memlab.budget import budget as budget_of
from memlab.ledger import COLUMNS
from memlab.measure import measure
from memlab.measurement import Measurement
from memlab.meters.device import bytes_alive, resolve_device, room_for
from memlab.meters.heap import most_held_by_python
from memlab.meters.refusals import OverBudget
from memlab.proof import FirstStep, first_step, gradient_difference, never_updated
from memlab.run import start_run
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
            enforced. What operators take for themselves does not count.
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
    limits = _Limits(parse_bytes(budget), min_compute, max_compute, tolerance)
    result = _check(build, reference, limits, steps, resolve_device(device))
    history.append(result)
    return result


@dataclass(frozen=True)
class _Limits:
    """What an answer must keep to; the fields are those of `check`."""

    budget: int
    min_compute: float
    max_compute: float
    tolerance: float


def _check(
    build: Callable | None, reference: Callable, limits: _Limits, steps: int, device: torch.device
) -> Result:
    before = measure(reference, steps=steps, device=device)
    budget_text = format_bytes(limits.budget)
    if before.known_bytes <= limits.budget:
        raise ValueError(
            f"the reference needs {format_bytes(before.known_bytes)} and meets the budget of"
            f" {budget_text} already: there is nothing to do"
        )
    ledgers = {"as it is": before.known_columns}
    nothing = (None, ...)
    if build in nothing or build() in nothing:
        needed = format_bytes(before.known_bytes)
        line = f"Not solved yet: {needed} has to become {budget_text}"
        return Result(False, [line], ledgers, limits.budget)

    # What operators take for themselves does not count: it depends on the processor.
    allowed = bytes_alive(device) + room_for(limits.budget, device)
    try:
        with budget_of(allowed, device=device, scratch=False) as enforced:
            alive_before = enforced.columns()
            after = measure(build, steps=steps, device=device)
    except OverBudget as error:
        ledgers["yours, when it ran out"] = columns = error.columns
        asked = ""
        if not error.measured:
            for column, count in alive_before.items():
                columns[column] = max(0, columns[column] - count)
            asked = f" asked for {format_bytes(error.asked)}" if error.asked else ""
        over = f"Over the budget of {budget_text}"
        ran_out = f"It ran out here: {error.place}{asked}."
        return Result(False, [over, ran_out, _where_to_look(columns)], ledgers, limits.budget)
    ledgers["yours"] = after.known_columns
    if after.known_bytes > limits.budget:  # only where there was more room than the budget
        needed = format_bytes(after.known_bytes)
        over = f"Over the budget of {budget_text}: {needed} at the peak, in {after.phase}"
        return Result(False, [over, _where_to_look(ledgers["yours"])], ledgers, limits.budget)
    passed, lines = _compare_first_steps(build, reference, before, after, limits)
    return Result(passed, lines, ledgers, limits.budget)


def _where_to_look(columns: dict[str, int]) -> str:
    largest = max(COLUMNS, key=lambda column: columns[column])
    return f"The largest column is {largest.replace('_', ' ')}. The hint below says where to look."


def _compare_first_steps(
    build: Callable,
    reference: Callable,
    before: Measurement,
    after: Measurement,
    limits: _Limits,
) -> tuple[bool, list[str]]:
    """Whether an answer that fits trains the same, and what to say of it."""
    hidden = max(
        _held_by_python(build) - _held_by_python(reference),
        after.outside_memory_bytes - before.outside_memory_bytes,
    )
    if hidden > MiB:
        return False, [
            f"It fits, but it holds {format_bytes(hidden)} where the meter does not count, in"
            " NumPy's arrays for one"
        ]
    expected, answer = first_step(reference), first_step(build)
    problem = _wrong_gradients(expected, answer, limits.tolerance)
    if problem:
        return False, ["It fits, but it does not train the same model", problem]
    compute = answer.flops / expected.flops if expected.flops else 1.0
    if compute < limits.min_compute:
        return False, [
            f"It fits, but it computes only {compute:.2f}× as much: a part of the task is missing"
        ]
    if compute > limits.max_compute:
        return False, [
            f"It fits, but it computes {compute:.2f}× as much; {limits.max_compute:g}× is allowed"
        ]
    less = f"{format_bytes(before.known_bytes)} → {format_bytes(after.known_bytes)}"
    difference = gradient_difference(expected, answer)
    return True, [
        f"Solved: {less}, budget {format_bytes(limits.budget)}",
        f"Largest gradient difference {difference:.1e} (allowed {limits.tolerance:.0e}), "
        f"{compute:.2f}× the floating-point operations (allowed {limits.max_compute:g}×).",
    ]


def _held_by_python(build: Callable) -> int:
    """The most bytes that Python and NumPy hold beside a step's tensors."""

    def take_a_step() -> None:
        started = start_run(build)
        try:
            started.step()
        finally:
            started.close()

    return most_held_by_python(take_a_step)


def _wrong_gradients(expected: FirstStep, answer: FirstStep, tolerance: float) -> str | None:
    if not answer.gradients:
        return (
            "No parameter has a gradient: the step has to call backward and let the optimizer step."
        )
    try:
        difference = gradient_difference(expected, answer)
    except ValueError as error:
        return f"{error}."
    if difference > tolerance:
        return f"The largest gradient difference is {difference:.1e}; {tolerance:.0e} is allowed."
    stale = never_updated(expected, answer)
    if stale:
        return (
            f"The step leaves {len(stale)} of {len(expected.updated)} parameters as they are"
            f" ({stale[0]})."
        )
    return None


def guess(mebibytes: float | None, measured: int, what: str = "the peak") -> None:
    """Print how far a learner's prediction is from what was measured.

    Args:
        mebibytes: the prediction in MiB, None if it is not made yet.
        measured: bytes.
        what: what was predicted.
    """
    if mebibytes is None:
        again = "write a number of MiB above and run the cells again."
        print(f"You have not predicted {what} yet: {again}")
        return
    off = mebibytes * MiB / measured - 1
    words = "worth a second look at the formula"
    if abs(off) < 0.10:
        words = "spot on" if abs(off) < 0.02 else "close"
    size = format_bytes(measured)
    print(f"You predicted {mebibytes:,.1f} MiB for {what}; measured {size}: {off:+.1%}, {words}.")
