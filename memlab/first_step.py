"""The first step of a run: its loss, its gradients, and the floating-point operations it took."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from memlab.meters.live import live_objects
from memlab.run import Run, RunEnded, loss_of, start_run


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
    started = None
    try:
        started = start_run(run, options)
        result, flops = _counted(started)
        for name, parameter in kept.parameters.items():
            kept.read_gradient(name, parameter)
        changed = kept.changed()
        loss = loss_of(result)
        del result
        for handle in handles:
            handle.remove()
        if started.builds_in_first_step:
            # Applying a technique may compute, too: the second step shows what a step alone takes.
            with contextlib.suppress(RunEnded):
                flops = _counted(started)[1]
    finally:
        for handle in handles:
            handle.remove()
        if started is not None:
            started.close()
        kept.parameters.clear()
        gc.collect()
    updated = changed | kept.stepped if changed else set()
    return FirstStep(loss, kept.gradients, flops, updated)


def _counted(started: Run) -> tuple[object, int]:
    """Take a step: its result, and its floating-point operations."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        result = started.step()
    return result, counter.get_total_flops()


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
