"""Proof beside the saving: the gradients of a run's first step, the floating-point operations it
took, its losses.
"""

from __future__ import annotations

import contextlib
import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from memlab.measure import Seconds
from memlab.meters.columns import live_objects

T = TypeVar("T")


def _attention_operations(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    """The operations of scaled dot-product attention: two matrix products. (batch, heads, length,
    width) each.
    """
    batch, heads, length, width = query
    # With grouped-query attention keys and values have fewer heads, and each is multiplied by
    # several queries.
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward_operations(gradient: object, *shapes: torch.Size, **__: object) -> int:
    """Five products in backward: the scores again, and the gradients of value, scores, query and
    key.
    """
    query, key, value = shapes[:3]
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (3 * width + 2 * value[3])


# PyTorch's counter knows no fused attention on the CPU, and none with fewer heads of keys than of
# queries on CUDA.
_ATTENTION = {
    getattr(torch.ops.aten, name + suffix): count
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    for suffix, count in (
        ("", _attention_operations),
        ("_backward", _attention_backward_operations),
    )
    if hasattr(torch.ops.aten, name + suffix)
}


@dataclass
class FirstStep:
    """What the first step of a run did: its loss, every parameter's gradient by name, its FLOPs,
    what it updated.

    `flops` counts the matrix products (two operations for each multiply-and-add), as
    `FlopCounterMode` does, those in fused attention included; masked scores count as computed.
    `updated` names the parameters that an optimizer stepped or whose values changed; if no value
    changed, none.
    """

    loss: float | None
    gradients: dict[str, torch.Tensor]
    flops: int
    updated: set[str] = field(default_factory=set)


def first_step(build: Callable[[], Callable[[], object]]) -> FirstStep:
    """Build a run, take one step, and keep the gradients it computed.

    A gradient is copied when the optimizer is about to use it, so it is seen also where the step
    sets it to None afterwards, and where the optimizer steps inside the backward. A parameter that
    no optimizer steps is read after the step. Names are those of the whole model, also where the
    step calls its parts one by one.

    Args:
        build: as for `memlab.measure`.
    """
    names: dict[int, str] = {}
    parameters: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    stepped: set[str] = set()

    def meet(parameter: torch.Tensor, name: str) -> str:
        if id(parameter) not in names:
            number, own = 1, name
            while name in parameters:  # two models side by side
                number += 1
                name = f"{own} of model {number}"
            names[id(parameter)] = name
            parameters[name] = parameter
            if not isinstance(parameter, nn.UninitializedParameter):
                values[name] = parameter.detach().to("cpu", copy=True)  # the host has the room
        return names[id(parameter)]

    def name_parameters(module: nn.Module, inputs: tuple) -> None:
        if any(id(parameter) not in names for parameter in module.parameters()):
            for name, parameter in _whole_model(module).named_parameters():
                meet(parameter, name)

    def read(name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and name not in gradients:
            gradient = parameter.grad.detach().clone()
            gradients[name] = gradient if gradient.layout is torch.strided else gradient.to_dense()

    def keep(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = meet(parameter, f"parameter {len(parameters)}")  # a new one is in no model
                read(name, parameter)
                if parameter.grad is not None:
                    stepped.add(name)

    handles = [
        register_module_forward_pre_hook(name_parameters),
        register_optimizer_step_pre_hook(keep),
    ]
    try:
        step = build()
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            result = step()
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in parameters.items():
        read(name, parameter)
    changed = {
        name
        for name, value in values.items()
        if not torch.equal(parameters[name].detach().cpu(), value)
    }
    loss = (
        float(result.detach()) if isinstance(result, torch.Tensor) and result.numel() == 1 else None
    )
    if isinstance(result, (int, float)):
        loss = float(result)
    del step, result
    parameters.clear()
    gc.collect()
    return FirstStep(
        loss, gradients, counter.get_total_flops(), changed | stepped if changed else set()
    )


def _whole_model(module: nn.Module) -> nn.Module:
    """The outermost module that holds this one: a step may call the parts of a model one by one."""
    whole, size = module, 0
    for candidate in live_objects(nn.Module):
        with contextlib.suppress(Exception):  # half-built, or of a class that lists nothing
            parts = list(candidate.modules())
            if len(parts) > size and any(part is module for part in parts):
                whole, size = candidate, len(parts)
    return whole


def gradient_difference(reference: FirstStep, other: FirstStep) -> float:
    """The largest difference between two runs' gradients, relative to the largest gradient of that
    parameter.

    0.0 means equal to the last bit. About 1e-6 is what another order of the same FP32 additions
    gives. A module wrapped around the whole model, as `torch.compile` does it, changes every name
    alike and is seen through.

    Raises:
        ValueError: a run has no gradients, or they are of other parameters or shapes.
    """
    if not reference.gradients:
        raise ValueError("the reference computed no gradient: does its step call backward?")
    expected_of, given_of = _same_names(reference.gradients, other.gradients)
    missing = sorted(expected_of.keys() - given_of.keys())
    if missing:
        raise ValueError(
            f"no gradient reached {len(missing)} of {len(expected_of)} parameters ({missing[0]})"
        )
    worst = 0.0
    for name, expected in expected_of.items():
        given = given_of[name]
        if given.shape != expected.shape:
            raise ValueError(
                f"the gradient of {name} has shape {tuple(given.shape)}, not"
                f" {tuple(expected.shape)}"
            )
        if not expected.numel():
            continue
        expected, given = expected.double(), given.to(expected.device).double()
        largest = expected.abs().max().item()
        difference = (given - expected).abs().max().item()
        # A NaN compares with nothing; it is the worst there is.
        relative = difference / largest if largest else difference
        worst = max(worst, float("inf") if relative != relative else relative)
    return worst


def never_updated(reference: FirstStep, other: FirstStep) -> list[str]:
    """The parameters that the reference's first step updates and the other's does not."""
    expected, given = _same_names(dict.fromkeys(reference.updated), dict.fromkeys(other.updated))
    return sorted(expected.keys() - given.keys())


def _same_names(one: dict[str, T], other: dict[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Two runs by names that fit: without what wrappers around modules add to them."""
    inner = re.compile(
        r"\b_(orig_mod|checkpoint_wrapped_module)\."
    )  # what torch.compile and checkpoint wrappers add
    pair = [{inner.sub("", name): value for name, value in names.items()} for names in (one, other)]
    if not pair[0].keys() & pair[1].keys():
        pair = [_without_prefix(names) for names in pair]
    return pair[0], pair[1]


def _without_prefix(by_name: dict[str, T]) -> dict[str, T]:
    """The same without what all names begin with: the attribute of a wrapper that holds the whole
    model.
    """
    while len({name.partition(".")[0] for name in by_name}) == 1 and all(
        "." in name for name in by_name
    ):
        by_name = {name.partition(".")[2]: value for name, value in by_name.items()}
    return by_name


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
            raise ValueError(
                "the step returns no loss: let it return the loss tensor or its number"
            )
        found.append(float(result.detach()) if isinstance(result, torch.Tensor) else float(result))
    del step
    gc.collect()
    return found


def time_together(
    builds: dict[str, Callable[[], Callable[[], object]]], repeats: int = 5
) -> dict[str, Seconds]:
    """Time steps of several runs in turn, so that a slow moment of the machine falls on all of them
    alike.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats has to be at least 1, not {repeats}")
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
    return {
        name: Seconds(statistics.median(t), max(t) - min(t), repeats) for name, t in times.items()
    }
