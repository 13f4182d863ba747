"""Proof beside the saving: the gradients of a run's first step, the floating-point operations it
took, its losses.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

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


def first_step(run: Callable, **options: object) -> FirstStep:
    """Build a run, take one step, and keep the gradients it computed.

    A gradient is copied when the optimizer is about to use it, so it is seen also where the step
    sets it to None afterwards, and where the optimizer steps inside the backward. A parameter that
    no optimizer steps is read after the step. Names are those of the whole model, also where the
    step calls its parts one by one.

    Args:
        run: as for `memlab.measure`.
        **options: keywords for the run.

    Returns:
        The `FirstStep`.
    """
    kept = _Kept()
    handles = [
        register_module_forward_pre_hook(kept.name_parameters),
        register_optimizer_step_pre_hook(kept.keep_gradients),
    ]
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    started = None
    try:
        started = start_run(run, options)
        with counter:
            result = started.step()
        for name, parameter in kept.parameters.items():
            kept.read_gradient(name, parameter)
        changed = kept.changed()
        loss = loss_of(result)
        del result
    finally:
        for handle in handles:
            handle.remove()
        if started is not None:
            started.close()
        kept.parameters.clear()
        gc.collect()
    updated = changed | kept.stepped if changed else set()
    return FirstStep(loss, kept.gradients, counter.get_total_flops(), updated)


class _Kept:
    """What is kept of a step while it runs: the parameters by name, their values before it, their
    gradients, and which of them an optimizer stepped.
    """

    def __init__(self):
        self.parameters: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.stepped: set[str] = set()
        self._names: dict[int, str] = {}
        self._values: dict[str, torch.Tensor] = {}

    def name_of(self, parameter: torch.Tensor, name: str) -> str:
        """The name of a parameter; `name`, if it is met for the first time."""
        if id(parameter) not in self._names:
            number, unnumbered = 1, name
            while name in self.parameters:  # two models side by side
                number += 1
                name = f"{unnumbered} of model {number}"
            self._names[id(parameter)] = name
            self.parameters[name] = parameter
            if not isinstance(parameter, nn.UninitializedParameter):
                # On the host, which has the room.
                self._values[name] = parameter.detach().to("cpu", copy=True)
        return self._names[id(parameter)]

    def name_parameters(self, module: nn.Module, inputs: tuple) -> None:
        """Before a module runs: name all parameters of the whole model."""
        if any(id(parameter) not in self._names for parameter in module.parameters()):
            for name, parameter in _whole_model(module).named_parameters():
                self.name_of(parameter, name)

    def read_gradient(self, name: str, parameter: torch.Tensor) -> None:
        """Copy a parameter's gradient, once."""
        if parameter.grad is not None and name not in self.gradients:
            gradient = parameter.grad.detach().clone()
            dense = gradient.layout is torch.strided
            self.gradients[name] = gradient if dense else gradient.to_dense()

    def keep_gradients(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Before an optimizer steps: copy the gradients that it is about to use."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # One that is met here for the first time is in no model.
                name = self.name_of(parameter, f"parameter {len(self.parameters)}")
                self.read_gradient(name, parameter)
                if parameter.grad is not None:
                    self.stepped.add(name)

    def changed(self) -> set[str]:
        """The names of the parameters that have other values than before."""
        return {
            name
            for name, value in self._values.items()
            if not torch.equal(self.parameters[name].detach().cpu(), value)
        }


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
