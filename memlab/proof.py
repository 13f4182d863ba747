"""Proof beside the saving: the gradients of a run's first step, the floating-point operations it
took, its losses.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from memlab.first_step import FirstStep, first_step
from memlab.meters.live import live_objects
from memlab.run import loss_of, start_run
from memlab.timing import time_together

__all__ = [
    "FirstStep",
    "first_step",
    "gradient_difference",
    "losses",
    "never_updated",
    "time_together",
]

T = TypeVar("T")

# What torch.compile and checkpoint wrappers add to a name.
_WRAPPERS = re.compile(r"\b_(orig_mod|checkpoint_wrapped_module)\.")


def gradient_difference(reference: FirstStep, other: FirstStep) -> float:
    """Return the largest difference between two runs' gradients, relative to the largest gradient
    of that parameter.

    0.0 means equal to the last bit. About 1e-6 is what another order of the same FP32 additions
    gives. A module wrapped around the whole model, as `torch.compile` does it, changes every name
    alike and is seen through.

    Args:
        reference: the first step of the run that counts as right.
        other: the first step of the other run.

    Raises:
        ValueError: a run has no gradients, or they are of other parameters or shapes.
    """
    if not reference.gradients:
        raise ValueError("the reference computed no gradient: does its step call backward?")
    expected_of, others = _same_names(reference.gradients, other.gradients)
    missing = sorted(expected_of.keys() - others.keys())
    if missing:
        raise ValueError(
            f"no gradient reached {len(missing)} of {len(expected_of)} parameters ({missing[0]})"
        )
    worst = 0.0
    for name, expected in expected_of.items():
        gradient = others[name]
        if gradient.shape != expected.shape:
            raise ValueError(
                f"the gradient of {name} has shape {tuple(gradient.shape)}, not"
                f" {tuple(expected.shape)}"
            )
        if expected.numel():
            worst = max(worst, _relative_difference(expected, gradient))
    return worst


def _relative_difference(expected: torch.Tensor, gradient: torch.Tensor) -> float:
    expected = expected.double()
    gradient = gradient.to(expected.device).double()
    largest = expected.abs().max().item()
    difference = (gradient - expected).abs().max().item()
    relative = difference / largest if largest else difference
    # A NaN compares with nothing; it is the worst there is.
    return float("inf") if math.isnan(relative) else relative


def never_updated(reference: FirstStep, other: FirstStep) -> list[str]:
    """The parameters that the reference's first step updates and the other's does not."""
    expected, updated = _same_names(dict.fromkeys(reference.updated), dict.fromkeys(other.updated))
    return sorted(expected.keys() - updated.keys())


def _same_names(first: dict[str, T], second: dict[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Two runs by names that fit: without what wrappers around modules add to them."""
    first = {_WRAPPERS.sub("", name): value for name, value in first.items()}
    second = {_WRAPPERS.sub("", name): value for name, value in second.items()}
    if not first.keys() & second.keys():
        return _without_prefix(first), _without_prefix(second)
    return first, second


def _without_prefix(by_name: dict[str, T]) -> dict[str, T]:
    """The same without what all names begin with: the attribute of a wrapper that holds the whole
    model.
    """
    while len({name.partition(".")[0] for name in by_name}) == 1 and all(
        "." in name for name in by_name
    ):
        by_name = {name.partition(".")[2]: value for name, value in by_name.items()}
    return by_name


def losses(run: Callable, steps: int, **options: object) -> list[float]:
    """Train for a number of steps with nothing switched on, and return each step's loss.

    Args:
        run: as for `memlab.measure`.
        steps: how many steps are taken.
        **options: keywords for the run.

    Raises:
        ValueError: a step returns no loss.
    """
    started = start_run(run, options)
    found = []
    try:
        for _ in range(steps):
            result = started.step()
            loss = loss_of(result)
            if loss is None:
                raise ValueError(
                    "the step returns no loss: let it return the loss tensor or its number"
                )
            found.append(loss)
            del result
    finally:
        started.close()
        gc.collect()
    return found
