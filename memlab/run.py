"""A run: what `measure`, `proof` and the exercises are given, in either of its two forms.

A generator function is a plain training loop. What comes before its first `yield` builds, each
`yield` ends a step, and what it yields is the loss:

    def train(checkpointing=False):
        model = ...
        for tokens, targets in batches:
            loss = model(tokens, targets)
            ...
            yield loss

The older form is a function that builds everything and returns the step to call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from numbers import Real

import torch
from torch import nn

#: Keywords that are memlab's own, so that no option of a run can have their names.
RESERVED = ("steps", "repeats", "device", "gpu", "lines", "ranks", "allocator", "progress")


class RunEnded(ValueError):
    """A generator was asked for one more step, and has none."""


class Run:
    """A run that has been started.

    Attributes:
        builds_in_first_step: whether the first step also builds (a generator).
    """

    def __init__(self, made: Generator | Callable[[], object]):
        self.builds_in_first_step = inspect.isgenerator(made)
        self._made: Generator | Callable[[], object] | None = made
        self._steps = 0

    def step(self) -> object:
        """Take the next step.

        Returns:
            What the step returned, or yielded: the loss.

        Raises:
            RunEnded: a generator has no further step.
        """
        if not self.builds_in_first_step:
            return self._made()
        try:
            result = next(self._made)
        except StopIteration:
            raise RunEnded(self._ended()) from None
        self._steps += 1
        return result

    def _ended(self) -> str:
        if not self._steps:
            return (
                "the run yielded nothing: it ended before its first `yield`. Let its loop end each"
                " step with `yield loss`; is there a batch to train on?"
            )
        return (
            f"the run ended after {self._steps} step{'s' * (self._steps != 1)}, and one more was"
            " asked for. Let its loop yield as many times as there are steps, or ask for fewer"
            f" (steps={self._steps})."
        )

    def close(self) -> None:
        """Free what the run holds."""
        if self.builds_in_first_step and self._made is not None:
            self._made.close()
        self._made = None


def check_run(run: object, options: Mapping[str, object] | None = None) -> None:
    """Refuse what is no run, or options that it does not take.

    Args:
        run: what the caller was given as a run.
        options: the keywords that it will be called with.

    Raises:
        ValueError: the message says what was given and what to do.
    """
    options = options or {}
    if isinstance(run, nn.Module):
        raise ValueError(
            "measure() was given a model. Give it a function that makes the model, the optimizer"
            " and the batch and returns the step to call; for a model that is there already, use"
            " `with watch(model, optimizer)`"
        )
    if inspect.isgenerator(run):
        raise ValueError(
            f"the run was called already: {describe(run)}. Pass the function itself and its options"
            " as keywords: measure(train, checkpointing=True), not measure(train(...))"
        )
    if not callable(run):
        raise ValueError(
            "build has to be a function that makes the model, the optimizer and the batch and"
            f" returns the step to call, not {describe(run)}"
        )
    own = [name for name in options if name in RESERVED]
    try:
        signature = inspect.signature(run)
    except (TypeError, ValueError):  # a builtin has none
        signature = None
    if signature is not None and inspect.isgeneratorfunction(_function(run)):
        own += [name for name in signature.parameters if name in RESERVED]
    if own:
        raise ValueError(
            f"the run has an option named {own[0]!r}, which is memlab's own"
            f" ({', '.join(RESERVED)} are). Give the option another name."
        )
    if signature is None:
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(
            f"the run cannot be called with these options ({error}). It takes {signature};"
            f" given were {', '.join(options) or 'none'}."
        ) from error


def _function(run: Callable) -> Callable:
    while isinstance(run, functools.partial):
        run = run.func
    return run


def start_run(run: Callable, options: Mapping[str, object] | None = None) -> Run:
    """Call a run and return what takes its steps.

    Args:
        run: a generator function, or a function that builds and returns the step to call.
        options: keywords for it.

    Raises:
        ValueError: it is no run, or it returned no step.
    """
    check_run(run, options)
    made = run(**(options or {}))
    if inspect.isgenerator(made):
        return Run(made)
    if not callable(made):
        raise ValueError(
            "build() has to return the step to call, a function without arguments; it returned"
            f" {describe(made)}. Is the training loop in it? Then `yield loss` where a step ends."
        )
    if isinstance(made, nn.Module):
        raise ValueError(
            "build() returned a model. It has to return the step to call: a function without"
            " arguments that runs forward, backward and optimizer.step()"
        )
    return Run(made)


def loss_of(result: object) -> float | None:
    """Return a step's loss as a number, or None if it returned none."""
    if isinstance(result, torch.Tensor) and result.numel() == 1:
        return float(result.detach())
    if isinstance(result, Real) and not isinstance(result, bool):
        return float(result)
    return None


def describe(thing: object) -> str:
    """Return what something is, for an error's text."""
    return "nothing (None)" if thing is None else f"{type(thing).__name__} {thing!r:.60}"
