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


#: The share of the model's largest gradient below which no parameter's gradient is divided by
#: itself.
SMALLEST_SHARE = 1e-3


def gradient_difference(reference: FirstStep, other: FirstStep) -> float:
    """Return the largest difference between two runs' gradients, relative to the largest gradient
    of that parameter, or to a thousandth of the model's largest gradient where that is more.

    0.0 means equal to the last bit. About 1e-6 is what another order of the same FP32 additions
    gives.

    Some gradients are zero in theory: that of a key's bias, since softmax does not see what is
    added to all scores alike, and that of a bias before a norm that takes the mean off. What is
    computed of them is rounding alone. Divided by itself, it would be a difference of 1, or of
    10,000 beside a run in BF16.

    The thousandth was measured, in BERT, ViT and U-Nets with a norm after each convolution. In FP32
    the gradients that are zero in theory are up to 1e-7 of the model's largest, and move by 5e-9
    of it from one order of the additions to another. In BF16 they move by 5e-4 of it. Beside a
    thousandth of it, that is as far as the other gradients of the same models are apart (5e-6 and
    0.5), and no further. Beside a ten-thousandth, it would be ten times as far in a U-Net.

    So a gradient that is smaller than the thousandth weighs less. One that is 1e-5 of the largest
    (the queries' of a BERT that was not trained yet) and twice too large is a difference of 0.01:
    far above what FP32 rounds, and as much as BF16 does.

    A module wrapped around the whole model, as `torch.compile` does it, changes every name alike
    and is seen through.

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
    floor = SMALLEST_SHARE * max(_largest(gradient) for gradient in expected_of.values())
    worst = 0.0
    for name, expected in expected_of.items():
        gradient = others[name]
        if gradient.shape != expected.shape:
            raise ValueError(
                f"the gradient of {name} has shape {tuple(gradient.shape)}, not"
                f" {tuple(expected.shape)}"
            )
        if expected.numel():
            worst = max(worst, _relative_difference(expected, gradient, floor))
    return worst


def _largest(gradient: torch.Tensor) -> float:
    return gradient.double().abs().max().item() if gradient.numel() else 0.0


def _relative_difference(expected: torch.Tensor, gradient: torch.Tensor, floor: float) -> float:
    gradient = gradient.to(expected.device).double()
    difference = _largest(gradient - expected.double())
    beside = max(_largest(expected), floor)
    relative = difference / beside if beside else difference
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
