"""Automatic mixed precision: weights stay in FP32, matrix products and what they save run in 16
bits.

`apply_mixed_precision` puts a model's forward under `torch.autocast`. The activations it saves for
backward shrink, most of them to half; weights, gradients and optimizer state do not. Each weight
that autograd saves is saved as a 16-bit copy, 2 bytes a parameter on top of the 4, so with a small
batch the peak can rise. FP16 has 5 bits of exponent, and small gradients become zero in it:
`torch.amp.GradScaler` cures that. BF16 has FP32's 8 bits and needs no scaler.

Sources: Micikevicius et al., "Mixed Precision Training" (2018), arXiv:1710.03740;
https://docs.pytorch.org/docs/stable/amp.html.
"""

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

#: What `torch.cpu.get_capabilities` calls the instructions that compute in 16 bits, on x86 and on
#: Arm.
_CPU_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def precision_support(dtype: torch.dtype, device: torch.device | str | None = None) -> str:
    """Say how a device computes in `torch.bfloat16` or `torch.float16`.

    Args:
        dtype: `torch.bfloat16` or `torch.float16`.
        device: A CPU or CUDA device, or its name. None asks about the accelerator in use, or the
            CPU without one.

    Returns:
        "native", "emulated" or "none". "native" on a CPU means that the processor has instructions
        for the type; not every operator uses them. "emulated" computes in FP32 and rounds: the
        bytes of 16 bits, the speed of 32 or less. A T4 does so for BF16, and
        `torch.cuda.is_bf16_supported()` says True of it.

    Raises:
        ValueError: Another dtype or kind of device.
        RuntimeError: A CUDA device that is not there.
    """
    if dtype not in _CPU_INSTRUCTIONS:
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, but it is {dtype}.")
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name, False) for name in _CPU_INSTRUCTIONS[dtype])
        return "native" if native else "emulated"
    if device.type != "cuda":
        raise ValueError(
            f"Nothing is known of {device.type} devices: ask about a CPU or a CUDA device."
        )
    if not torch.cuda.is_available():
        raise RuntimeError("There is no CUDA device here.")
    with torch.cuda.device(device):
        # Every GPU that PyTorch 2.11 is built for computes in FP16.
        if dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False):
            return "native"
        return "emulated" if torch.cuda.is_bf16_supported(including_emulation=True) else "none"


def bf16_support(device: torch.device | str | None = None) -> str:
    """Return `precision_support` of `torch.bfloat16`.

    Args:
        device: As for `precision_support`.

    Returns:
        "native", "emulated" or "none".
    """
    return precision_support(torch.bfloat16, device)


def apply_mixed_precision(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16, *, cache_weights: bool = True
) -> "Handle":
    """Run the model's forward under autocast, from outside.

    Outputs stay as the model makes them, 16-bit ones too. Parameters, `state_dict` and classes do
    not change. Compute the loss in the model, or convert its output with `.float()` first. With
    `torch.float16`, train with `torch.amp.GradScaler`.

    Args:
        model: A model whose parameters are FP32, on one kind of device; those that wait on the CPU
            beside another device, as in offloading, do not count.
        dtype: `torch.bfloat16` or `torch.float16`.
        cache_weights: Keep the 16-bit copy of every weight until the forward pass ends, so that a
            weight used twice is copied once. False copies at each use. Without gradient
            checkpointing autograd holds most copies anyway; with it, the cache alone does, at 2
            bytes a parameter: pass False then.

    Returns:
        A handle: `remove()` undoes it.

    Raises:
        TypeError: A model that is no module.
        ValueError: A dtype that is not FP16 or BF16 or not supported on the model's device, a model
            with no parameters or with floating-point parameters that are not FP32 (there is nothing
            left to mix), parameters on several kinds of device, or a second application.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    _check_parameters(model, dtype)
    if _is_applied(model, _under_autocast):
        raise ValueError(
            f"Mixed precision is applied to this {type(model).__name__} already: remove() it first."
        )
    handle = Handle()
    handle.wrap_forward("", model, _under_autocast, dtype, cache_weights)
    return handle


def _under_autocast(
    model: nn.Module, forward: Callable, dtype: torch.dtype, cache_weights: bool, /, *args, **kwargs
):
    # Asked anew each time: the model may have moved.
    device = _computing_devices(list(model.parameters()))[0]
    with torch.autocast(device.type, dtype, cache_enabled=cache_weights):
        return forward(*args, **kwargs)


def _check_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    name = type(model).__name__
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError(
            f"{name} has no parameters, so there is nothing to run in lower precision."
        )
    dtypes = {p.dtype for p in parameters if p.is_floating_point() or p.is_complex()}
    if other := dtypes - {torch.float32}:
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


def _computing_devices(parameters: list[nn.Parameter]) -> list[torch.device]:
    """The devices that a model computes on. Beside another device, parameters on the CPU only wait
    to be moved.
    """
    devices = [p.device for p in parameters]
    return [device for device in devices if device.type not in ("cpu", "meta")] or devices


# --- pasted from _patch.py: begin -----------------------------------------------------------------


class Handle:
    """What a technique has changed in a model: `names` says where, `remove()` undoes it.

    As a context manager it removes at the end of the block. It holds the model weakly, and a model
    keeps what was applied to it when its handle is gone.

    `never_used` are the names of what has not run since. A trainer that goes round a model's output
    layer, for example, never calls what was put there. `remove()` warns of it.
    """

    def __init__(self):
        self.names: list[str] = []
        # For each forward that was wrapped, its name, and what the forward itself notes in.
        self._uses: list[tuple[str, dict]] = []
        # By their owners: what was replaced lives no longer than the model that it was replaced in.
        self._replaced = weakref.WeakKeyDictionary()
        self._undo = []

    @property
    def never_used(self) -> list[str]:
        """The names of the modules whose changed forward has not run since."""
        return [name for name, use in self._uses if not use["used"]]

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo all that was applied if an error ends this block."""
        try:
            yield
        except BaseException:
            self._restore()
            raise

    def wrap_forward(
        self,
        name: str,
        module: nn.Module,
        function: Callable,
        *options,
        innermost: bool = False,
        for_backward: bool = False,
    ) -> None:
        """Let `function(module, forward, *options, *args, **kwargs)` run as the module's forward.

        Its `forward` is what ran before, or runs further inside. A copy or a pickle of the model
        takes function and options along: a function that has a name, and plain options.

        Args:
            name: What the module is called in the model.
            innermost: Put it below all that is applied already, for a function that computes what
                the module's own forward does, and never calls it.
            for_backward: It changes only what backward does: a call without gradients is no use of
                it.
        """
        patched = vars(module).get("forward")
        if type(patched).__name__ != "_PatchedForward":
            patched = module.forward = _PatchedForward(module, patched)
        use = {"used": False, "for_backward": for_backward}
        patch = (function, options, use)
        patched.patches.insert(0 if innermost else len(patched.patches), patch)
        self.names.append(name)
        self._uses.append((name, use))
        self._undo.append(functools.partial(_unwrap, weakref.ref(patched), patch))

    def replace(self, name: str, owner: nn.Module, attribute: str, value) -> None:
        """Give an attribute or a submodule of `owner` another value."""
        before = getattr(owner, attribute)
        setattr(owner, attribute, value)
        self.names.append(name)
        self._replaced.setdefault(owner, []).append((name, attribute, before, value))

    def on_remove(self, undo: Callable) -> None:
        """Let `remove()` call `undo()` too: the `remove` of a hook, for example."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Undo what was applied, the last change first, whatever was applied to the model since.

        A second call does nothing.

        Raises:
            RuntimeError: Something else has replaced an attribute since. Nothing is undone then.

        Warns:
            UserWarning: Some of it was never used.
        """
        was_applied = bool(self._undo)
        self._restore()
        if was_applied:
            self._warn_of_unused()

    def _warn_of_unused(self) -> None:
        names = [name or "the model" for name in self.never_used]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        if names:
            warnings.warn(
                f"Never used: {', '.join(names[:4])}{more}. It was applied there, and nothing has"
                " called it since. If the model ran, its caller went round it.",
                stacklevel=3,
            )

    def _restore(self) -> None:
        replaced = [
            (owner, *entry) for owner, entries in self._replaced.items() for entry in entries
        ]
        for owner, name, attribute, _, value in replaced:
            if getattr(owner, attribute, None) is not value:
                raise RuntimeError(
                    f"Something has replaced {attribute!r} of {name or 'the model'} since this was"
                    " applied: undo that first, then call remove() again."
                )
        for owner, _, attribute, before, _ in replaced:
            setattr(owner, attribute, before)
        self._replaced.clear()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, kind, *_) -> None:
        was_applied = bool(self._undo)
        self._restore()
        if was_applied and kind is None:  # beside an error it would be one line too many
            self._warn_of_unused()

    def __repr__(self) -> str:
        unused = f", never_used={self.never_used}" if self.never_used else ""
        return f"{type(self).__name__}(names={self.names}{unused})"


class _PatchedForward:
    """The `forward` of a module that something is applied to: each patch around the one before.

    It holds the module weakly: otherwise a deleted model would be a cycle, and stay in memory until
    the garbage collector came. In a copy of the model it is the copy's.
    """

    # Slots, and so no `__dict__`: `functools.wraps` would copy that to a forward put over this one.
    __slots__ = ("__weakref__", "before", "module", "patches")

    def __init__(self, module: nn.Module, before: Callable | None, patches=()):
        self.module = weakref.ref(module)
        self.before = before  # a forward that the instance had, from somebody else
        self.patches = list(patches)

    def unpatched(self) -> Callable:
        module = self.module()
        if module is None:
            raise ReferenceError("The model is gone that this forward belongs to: keep the model.")
        return self.before or functools.partial(type(module).forward, module)

    def __call__(self, *args, **kwargs):
        forward = self.unpatched()
        for function, options, use in self.patches:
            forward = functools.partial(function, self.module(), forward, *options)
            if torch.is_grad_enabled() or not use["for_backward"]:
                use["used"] = True
        return forward(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.unpatched())

    def __reduce__(self):
        return type(self), (self.module(), self.before, self.patches)


def _is_applied(module: nn.Module, function: Callable) -> bool:
    """Whether `function` is among the patches of a module's forward."""
    patches = getattr(vars(module).get("forward"), "patches", ())
    return any(patch[0] is function for patch in patches)


def _unwrap(reference: weakref.ref, patch: tuple) -> None:
    patched = reference()
    if patched is None:
        return
    patched.patches[:] = [other for other in patched.patches if other is not patch]
    module = patched.module()
    if module is None or patched.patches or vars(module).get("forward") is not patched:
        return  # a forward that somebody has put over it stays, and what is below lets all through
    del module.forward
    if patched.before is not None:
        module.forward = patched.before


# --- pasted from _patch.py: end -------------------------------------------------------------------
