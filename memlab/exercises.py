"""Exercises: a budget that is enforced, gradients that have to be the same, and a picture of what happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from memlab import figures
from memlab.budget import budget as budget_of
from memlab.budget import bytes_alive, resolve_device
from memlab.measure import measure
from memlab.proof import FirstStep, first_step, gradient_difference
from memlab.units import MiB, format_bytes, parse_bytes

#: Every result of `check` in this process, in order. The course's own tests read it.
history: list[Result] = []


@dataclass
class Result:
    """Whether an exercise is solved, why (not), and the ledgers of the reference and of the answer."""

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
    tolerance: float = 1e-4,
    steps: int = 2,
    device: str | torch.device | None = None,
) -> Result:
    """Check an answer: does it fit the budget, are its gradients the reference's, what does it cost?

    Args:
        build: the learner's answer, a function as for `memlab.measure`; None (or a function that returns None) as long
            as there is none.
        reference: the run whose gradients count, and which does not fit the budget.
        budget: the most bytes allowed at once ("60 MiB"), counted from zero for the answer. It is enforced.
        max_compute: the most floating-point operations allowed, as a multiple of the reference's. Operations rather
            than seconds: they are the same on a busy machine.
        tolerance: the largest relative difference allowed between the gradients.
        steps: how many steps are run.
        device: as for `memlab.measure`.

    Raises:
        ValueError: the reference itself meets the budget, so there would be nothing to do.
    """
    result = _check(build, reference, parse_bytes(budget), max_compute, tolerance, steps, resolve_device(device))
    history.append(result)
    return result


def _check(
    build: Callable | None,
    reference: Callable,
    limit: int,
    max_compute: float,
    tolerance: float,
    steps: int,
    device: torch.device,
) -> Result:
    before = measure(reference, steps=steps, device=device)
    if before.peak_bytes <= limit:
        raise ValueError(
            f"the reference needs {format_bytes(before.peak_bytes)} and meets the budget of {format_bytes(limit)} "
            f"already: there is nothing to do"
        )
    ledgers = {"as it is": before.columns}
    if build is None or _returns_nothing(build):
        line = f"Not solved yet: {format_bytes(before.peak_bytes)} has to become {format_bytes(limit)}"
        return Result(False, [line], ledgers, limit)

    try:
        with budget_of(bytes_alive(device) + limit, device=device):
            after = measure(build, steps=steps, device=device)
    except torch.OutOfMemoryError as error:
        columns = getattr(error, "columns", None)
        if columns:
            ledgers["yours, when it ran out"] = columns
        return Result(False, [f"Over the budget of {format_bytes(limit)}", *str(error).splitlines()], ledgers, limit)
    ledgers["yours"] = after.columns

    wanted, given = first_step(reference), first_step(build)
    problem = _wrong_gradients(wanted, given, tolerance)
    if problem:
        return Result(False, ["It fits, but it does not train the same model", problem], ledgers, limit)
    compute = given.flops / wanted.flops if wanted.flops else 1.0
    if compute > max_compute:
        line = f"It fits, but it computes {compute:.2f}× as much; {max_compute:g}× is allowed"
        return Result(False, [line], ledgers, limit)
    lines = [
        f"Solved: {format_bytes(before.peak_bytes)} → {format_bytes(after.peak_bytes)}, budget {format_bytes(limit)}",
        f"Largest gradient difference {gradient_difference(wanted, given):.1e} (allowed {tolerance:.0e}), "
        f"{compute:.2f}× the floating-point operations (allowed {max_compute:g}×).",
    ]
    return Result(True, lines, ledgers, limit)


def _returns_nothing(build: Callable) -> bool:
    """Whether an answer is still empty: `build()` gives None or `...`."""
    step = build()
    return step is None or step is ...


def _wrong_gradients(wanted: FirstStep, given: FirstStep, tolerance: float) -> str | None:
    if not given.gradients:
        return "No parameter has a gradient: the step has to call backward and let the optimizer step."
    try:
        difference = gradient_difference(wanted, given)
    except ValueError as error:
        return f"{error}."
    if difference > tolerance:
        return f"The largest gradient difference is {difference:.1e}; {tolerance:.0e} is allowed."
    return None


def guess(mebibytes: float | None, measured: int, what: str = "the peak") -> None:
    """Print how far a learner's prediction (in MiB, None if not made yet) is from what was measured (bytes)."""
    if mebibytes is None:
        print(f"You have not predicted {what} yet: write a number of MiB above and run the cells again.")
        return
    off = mebibytes * MiB / measured - 1
    words = "spot on" if abs(off) < 0.02 else "close" if abs(off) < 0.10 else "worth a second look at the formula"
    print(f"You predicted {mebibytes:,.1f} MiB for {what}; measured {format_bytes(measured)}: {off:+.1%}, {words}.")
