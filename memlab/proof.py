"""Proof beside the saving: the gradients of a run's first step, the floating-point operations it took, its losses."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from memlab.measure import Seconds


@dataclass
class FirstStep:
    """What the first step of a run did: its loss, every parameter's gradient by name, and its FLOPs.

    `flops` counts the matrix products (two operations for each multiply-and-add), as `FlopCounterMode` does.
    """

    loss: float | None
    gradients: dict[str, torch.Tensor]
    flops: int


def first_step(build: Callable[[], Callable[[], object]]) -> FirstStep:
    """Build a run, take one step, and keep the gradients it computed.

    A gradient is copied when the optimizer is about to use it, so it is seen also where the step sets it to None
    afterwards, and where the optimizer steps inside the backward. A parameter that no optimizer steps is read after
    the step.

    Args:
        build: as for `memlab.measure`.
    """
    names: dict[int, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    gradients: dict[str, torch.Tensor] = {}

    def name_parameters(module: nn.Module, inputs: tuple) -> None:
        # The outermost module is the first to be called; its names are the full ones.
        for name, parameter in module.named_parameters():
            if id(parameter) not in names:
                names[id(parameter)] = name
                parameters[name] = parameter

    def keep(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(id(parameter), f"parameter {len(gradients)}")
                if parameter.grad is not None and name not in gradients:
                    gradients[name] = parameter.grad.detach().clone()

    handles = [register_module_forward_pre_hook(name_parameters), register_optimizer_step_pre_hook(keep)]
    try:
        step = build()
        with FlopCounterMode(display=False) as counter:
            result = step()
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in parameters.items():
        if name not in gradients and parameter.grad is not None:
            gradients[name] = parameter.grad.detach().clone()
    loss = float(result.detach()) if isinstance(result, torch.Tensor) and result.numel() == 1 else None
    if isinstance(result, (int, float)):
        loss = float(result)
    del step, result
    parameters.clear()
    gc.collect()
    return FirstStep(loss, gradients, counter.get_total_flops())


def gradient_difference(reference: FirstStep, other: FirstStep) -> float:
    """The largest difference between two runs' gradients, relative to the largest gradient of that parameter.

    0.0 means equal to the last bit. About 1e-6 is what another order of the same FP32 additions gives.

    Raises:
        ValueError: a run has no gradients, or they are of other parameters or shapes.
    """
    if not reference.gradients:
        raise ValueError("the reference computed no gradient: does its step call backward?")
    missing = sorted(reference.gradients.keys() - other.gradients.keys())
    if missing:
        raise ValueError(f"no gradient reached {len(missing)} of {len(reference.gradients)} parameters ({missing[0]})")
    worst = 0.0
    for name, expected in reference.gradients.items():
        given = other.gradients[name]
        if given.shape != expected.shape:
            raise ValueError(f"the gradient of {name} has shape {tuple(given.shape)}, not {tuple(expected.shape)}")
        expected, given = expected.double(), given.double()
        largest = expected.abs().max().item()
        difference = (given - expected).abs().max().item()
        # A NaN compares with nothing; it is the worst there is.
        relative = difference / largest if largest else difference
        worst = max(worst, float("inf") if relative != relative else relative)
    return worst


def losses(build: Callable[[], Callable[[], object]], steps: int) -> list[float]:
    """Train for a number of steps with nothing switched on, and return each step's loss.

    Raises:
        ValueError: the step returns no loss.
    """
    step = build()
    found = []
    for _ in range(steps):
        result = step()
        if result is None:
            raise ValueError("the step returns no loss: let it return the loss tensor or its number")
        found.append(float(result.detach()) if isinstance(result, torch.Tensor) else float(result))
    del step
    gc.collect()
    return found


def time_together(builds: dict[str, Callable[[], Callable[[], object]]], repeats: int = 5) -> dict[str, Seconds]:
    """Time steps of several runs in turn, so that a slow moment of the machine falls on all of them alike."""
    import statistics
    import time

    steps = {name: build() for name, build in builds.items()}
    times: dict[str, list[float]] = {name: [] for name in builds}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, step in steps.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: Seconds(statistics.median(t), max(t) - min(t), repeats) for name, t in times.items()}
