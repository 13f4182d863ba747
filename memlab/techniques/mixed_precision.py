"""Automatic mixed precision: weights stay in FP32, matrix products and what they save run in 16
bits.

`apply_mixed_precision` puts a model's forward under `torch.autocast`. The activations it saves for
backward shrink, most of them to half; weights, gradients and optimizer state do not. Each weight
that autograd saves is saved as a 16-bit copy, 2 bytes a parameter on top of the 4, so with a small
batch the peak can rise. FP16 has 5 bits of exponent, and small gradients become zero in it:
`LossScaler` cures that. BF16 has FP32's 8 bits and needs no scaler.

Source: Micikevicius et al., "Mixed Precision Training" (2018), arXiv:1710.03740.
"""

import inspect
import weakref

import torch
from torch import Tensor, nn

# What `torch.cpu.get_capabilities` calls the instructions that compute in 16 bits, on x86 and on
# Arm.
_CPU_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def precision_support(dtype: torch.dtype, device=None) -> str:
    """Say how a device computes in `torch.bfloat16` or `torch.float16`: "native", "emulated" or
    "none".

    "emulated" computes in FP32 and rounds: the bytes of 16 bits, the speed of 32 or less. A T4 does
    so for BF16, and `torch.cuda.is_bf16_supported()` says True of it. "native" on a CPU means that
    the processor has instructions for the type; not every operator uses them.

    device: a CPU or CUDA device, or its name; None asks about the accelerator in use, or the CPU
    without one.

    Raises ValueError for another dtype or kind of device, and RuntimeError for a CUDA device that
    is not there.
    """
    if dtype not in _CPU_INSTRUCTIONS:
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, but it is {dtype}.")
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return (
            "native"
            if any(has.get(name, False) for name in _CPU_INSTRUCTIONS[dtype])
            else "emulated"
        )
    if device.type != "cuda":
        raise ValueError(
            f"Nothing is known of {device.type} devices: ask about a CPU or a CUDA device."
        )
    if not torch.cuda.is_available():
        raise RuntimeError("There is no CUDA device here.")
    with torch.cuda.device(device):
        if dtype == torch.float16:  # every GPU that PyTorch 2.11 is built for computes in it
            return "native"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "native"
        return "emulated" if torch.cuda.is_bf16_supported(including_emulation=True) else "none"


def bf16_support(device=None) -> str:
    """`precision_support` of `torch.bfloat16`."""
    return precision_support(torch.bfloat16, device)


def apply_mixed_precision(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16, *, cache_weights: bool = True
) -> "MixedPrecisionHandle":
    """Run the model's forward under autocast, from outside; `remove()` on the result undoes it.

    Outputs stay as the model makes them, 16-bit ones too. Parameters, `state_dict` and classes do
    not change. Compute the loss in the model, or convert its output with `.float()` first. With
    `torch.float16`, train with `LossScaler`.

    cache_weights: keep the 16-bit copy of every weight until the forward pass ends, so that a
        weight used twice is copied once. False copies at each use. Without gradient checkpointing
        autograd holds most copies anyway; with it, the cache alone does, at 2 bytes a parameter:
        pass False then.

    Remove it before copying or pickling the model (TypeError otherwise). Raises TypeError for a
    model that is no module, and ValueError for a dtype that is not FP16 or BF16 or not supported on
    the model's device, a model with no parameters or with floating-point parameters that are not
    FP32 (there is nothing left to mix), parameters on several kinds of device (those that wait on
    the CPU beside another device, as in offloading, do not count), or a second application.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    name, parameters = type(model).__name__, list(model.parameters())
    if not parameters:
        raise ValueError(
            f"{name} has no parameters, so there is nothing to run in lower precision."
        )
    if other := {p.dtype for p in parameters if p.is_floating_point() or p.is_complex()} - {
        torch.float32
    }:
        raise ValueError(
            f"All parameters must be FP32, but {name} has {', '.join(sorted(map(str, other)))}. "
            "Call model.float() first."
        )
    devices = _computing_devices(parameters)
    if len({device.type for device in devices}) > 1:
        kinds = ", ".join(sorted({p.device.type for p in parameters}))
        raise ValueError(f"{name} must be on one kind of device, but it is on {kinds}.")
    if precision_support(dtype, devices[0]) == "none":
        raise ValueError(f"{devices[0]} does not support {dtype}.")
    if isinstance(vars(model).get("forward"), _AutocastForward):
        raise ValueError(f"Mixed precision is applied to this {name} already: remove() it first.")
    return MixedPrecisionHandle(_AutocastForward(model, dtype, cache_weights))


def _computing_devices(parameters: list[nn.Parameter]) -> list[torch.device]:
    """The devices that a model computes on. Beside another device, parameters on the CPU only wait
    to be moved.
    """
    devices = [p.device for p in parameters]
    return [device for device in devices if device.type not in ("cpu", "meta")] or devices


class MixedPrecisionHandle:
    """Undoes `apply_mixed_precision`."""

    def __init__(self, forward: "_AutocastForward"):
        self._forward = forward
        forward.model().forward = forward

    def remove(self) -> None:
        """Give the model back the `forward` it had; a second call does nothing.

        Raises RuntimeError when something else has replaced the `forward` since: undo that first.
        """
        forward, model = self._forward, self._forward and self._forward.model()
        if model is not None:
            if vars(model).get("forward") is not forward:
                raise RuntimeError("Something replaced the model's forward since: undo that first.")
            del model.forward
            if forward.previous is not None:
                model.forward = forward.previous
        self._forward = None


class _AutocastForward:
    """The `forward` of a model under autocast. It holds the model weakly: otherwise a deleted model
    would be a cycle and stay in memory until the garbage collector came."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, cache_weights: bool):
        self.model, self.dtype, self.cache_weights = weakref.ref(model), dtype, cache_weights
        self.previous = vars(model).get("forward")
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args, **kwargs):
        model = self.model()
        device = _computing_devices(list(model.parameters()))[
            0
        ].type  # asked anew: the model may have moved
        with torch.autocast(device, self.dtype, cache_enabled=self.cache_weights):
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            return type(model).forward(model, *args, **kwargs)

    def __reduce__(self):
        raise TypeError(
            "This model has mixed precision applied: remove() it before copying or pickling."
        )


class LossScaler:
    """Dynamic loss scaling, for FP16: small gradients would become zero, so the loss is multiplied
    by a large factor and the gradients are divided by it before the optimizer's step.

    When a gradient overflows, the step is skipped and `scale_factor` multiplied by
    `backoff_factor`; after `growth_interval` steps in a row without, it is multiplied by
    `growth_factor`. The numbers are those of `torch.amp.GradScaler`, whose `update()` is part of
    `step` here. For one process; a step reads one bit from the device.

    >>> scaler.scale(loss).backward()
    >>> scaler.unscale_(optimizer)  # only before clipping gradients
    >>> stepped = scaler.step(optimizer)

    Raises ValueError for an `init_scale` or `growth_interval` that is not positive, a
    `growth_factor` not above 1 or a `backoff_factor` not between 0 and 1.
    """

    _RULES = {
        "scale_factor": ("positive and finite", lambda value: 0 < value < float("inf")),
        "growth_factor": ("above 1", lambda value: 1 < value < float("inf")),
        "backoff_factor": ("between 0 and 1", lambda value: 0 < value < 1),
        "growth_interval": ("a positive int", lambda value: isinstance(value, int) and value > 0),
        "good_steps": ("0 or a positive int", lambda value: isinstance(value, int) and value >= 0),
    }

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ):
        self._scaled = False  # whether there was a loss since the last step
        # id of an optimizer with divided gradients -> the least and greatest of each
        self._extremes = {}
        self.load_state_dict(
            {
                "scale_factor": init_scale,
                "growth_factor": growth_factor,
                "backoff_factor": backoff_factor,
                "growth_interval": growth_interval,
                "good_steps": 0,
            }
        )

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times `scale_factor`, in FP32 at least: in FP16 it would overflow here
        already.
        """
        self._scaled = True
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.scale_factor

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of an optimizer by `scale_factor`, to clip them before `step`.

        Raises RuntimeError when there are no gradients or it was done already, and ValueError for
        FP16 gradients.
        """
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if not gradients:
            raise RuntimeError("The optimizer has no gradients: call scale(loss).backward() first.")
        if id(optimizer) in self._extremes:
            raise RuntimeError(
                "The gradients of this optimizer are divided already: unscale_ is for once a step."
            )
        if any(gradient.dtype == torch.float16 for gradient in gradients):
            raise ValueError(
                "The gradients are FP16, so the weights are: keep them FP32 and use autocast."
            )
        extremes = self._extremes[id(optimizer)] = []
        for gradient in gradients:
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            # They are NaN if any value is; `isfinite` of all values would take more memory than the
            # gradient.
            extremes += torch.aminmax(values) if values.numel() else ()
            gradient.mul_(1 / self.scale_factor)

    def step(self, *optimizers: torch.optim.Optimizer) -> bool:
        """Step the optimizers of one backward pass, unless a gradient overflowed, and adapt the
        scale.

        Returns True when they stepped and False when the step was skipped. Raises RuntimeError when
        no loss was scaled since the last step, and FloatingPointError when gradients are not finite
        however small the scale is.
        """
        if not (self._scaled and optimizers):
            raise RuntimeError(
                "Call scale(loss).backward() before step; give all its optimizers to one step."
            )
        for optimizer in optimizers:
            if id(optimizer) not in self._extremes:
                self.unscale_(optimizer)
        extremes = [
            extreme for optimizer in optimizers for extreme in self._extremes[id(optimizer)]
        ]
        extremes = [extreme.to(extremes[0].device, torch.float32) for extreme in extremes]
        overflow = (
            not torch.stack(extremes).isfinite().all().item()
        )  # here, once a step, the host waits
        self._scaled, self._extremes = False, {}
        if overflow:
            self.scale_factor *= self.backoff_factor
            self.good_steps = 0
            if self.scale_factor < torch.finfo(torch.float32).tiny:
                raise FloatingPointError(
                    "Gradients are inf or NaN at every scale: look at the loss, not the scaler."
                )
            return False
        for optimizer in optimizers:
            optimizer.step()
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.good_steps = 0
            if self.scale_factor * self.growth_factor <= torch.finfo(torch.float32).max:
                self.scale_factor *= self.growth_factor
        return True

    def state_dict(self) -> dict:
        """Return all that a resumed run needs, as plain numbers."""
        return {name: getattr(self, name) for name in self._RULES}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned. Raises ValueError for other keys or values out of
        range.
        """
        if state.keys() != self._RULES.keys():
            raise ValueError(
                f"The state must have {', '.join(self._RULES)}, but it has"
                f" {', '.join(map(str, state))}."
            )
        for name, (rule, valid) in self._RULES.items():
            if not valid(state[name]):
                raise ValueError(f"{name} must be {rule}, but it is {state[name]!r}.")
        for name, value in state.items():
            setattr(self, name, value)
