"""In-place operations: write a result over a tensor that nobody needs any more.

Outside of autograd, as in an optimizer's step, you decide what is needed no more. `InPlaceAdamW` is
AdamW without temporaries: once the moments have taken up a gradient, its memory serves as the
scratch space. Under autograd the graph decides, by what it has saved for backward.
`apply_in_place_activations` tries each activation of a model in place, and keeps those that leave
the output and the gradients as they are. Neither costs operations. A leaky ReLU, an ELU or a
relative saves one activation, since in place they save their output, which the next layer saves
too. A ReLU does so anyway, and saves a temporary at most.

Sources: PyTorch's notes, "Autograd mechanics: in-place operations with autograd"; Loshchilov and
Hutter, "Decoupled Weight Decay Regularization" (2019), arXiv:1711.05101; Rota Bulò et al.,
"In-Place Activated BatchNorm for Memory-Optimized Training of DNNs" (2018), arXiv:1712.02616. In
production: `AdamW(fused=True)`.
"""

import contextlib
import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import activation

# --- Outside of autograd: an optimizer's step -----------------------------------------------------


class InPlaceAdamW(torch.optim.AdamW):
    """AdamW whose step needs no temporaries: it uses up the gradients, and sets them to None.

    The updates are those of `torch.optim.AdamW(foreach=False)`, bit for bit, and either loads the
    other's `state_dict`. Read or clip gradients before the step. It works on one parameter at a
    time, which on a GPU is slower than `fused=True`: use that in production.

    Args:
        params: As for `torch.optim.AdamW`, and so are the others.
        lr: The learning rate.
        betas: How much of the two moments stays at each step.
        eps: What is added to the denominator.
        weight_decay: What share of a weight is taken away at each step, times `lr`.

    Raises:
        ValueError: In `step`, before anything is changed: a gradient is sparse or complex or shares
            its memory with another one, or a state was loaded with amsgrad or maximize.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, foreach=False)

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient; return what `closure` returns."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._check()
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                self._update(parameter, group)
                parameter.grad = None  # what it holds now is no gradient: nobody shall add to it
        return loss

    def _update(self, parameter: Tensor, group: dict) -> None:
        gradient = parameter.grad
        state = self.state[parameter]
        lr = float(group["lr"])
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        mean = state["exp_avg"]
        square = state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = state["step"].item()

        parameter.mul_(1 - lr * group["weight_decay"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # The moments have what they need of the gradient. From here on its memory is the scratch
        # space.
        denominator = torch.sqrt(square, out=gradient)
        denominator.div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))

    def _check(self) -> None:
        seen = set()
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError(
                    "InPlaceAdamW has no amsgrad and no maximize: use torch.optim.AdamW."
                )
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None or not gradient.numel():
                    continue
                which = f"The gradient of a parameter of shape {tuple(parameter.shape)}"
                if gradient.layout is not torch.strided or gradient.is_complex():
                    raise ValueError(
                        f"{which} is {gradient.dtype}, {gradient.layout}: InPlaceAdamW takes dense"
                        " real ones."
                    )
                strides = zip(gradient.shape, gradient.stride(), strict=True)
                if gradient.data_ptr() in seen or any(
                    size > 1 and stride == 0 for size, stride in strides
                ):
                    raise ValueError(
                        f"{which} shares its memory, and InPlaceAdamW writes into gradients:"
                        " .clone() it first."
                    )
                seen.add(gradient.data_ptr())


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


# --- Under autograd: a model's activations --------------------------------------------------------

_GRADIENT = "the gradient of"


class Verdict(NamedTuple):
    """What was found about one activation.

    Attributes:
        name: Its name in the model.
        kind: Its class.
        in_place: Whether it is in place now.
        saved_bytes: The bytes that autograd saves less with the inputs of the trial.
        reason: Why, in words.
    """

    name: str
    kind: str
    in_place: bool
    saved_bytes: int
    reason: str


class InPlaceActivations(Handle):
    """What `apply_in_place_activations` did: `verdicts`, one for each activation, and a handle.

    `names` are the activations whose switch was changed, and `remove()` sets it back. Print it for
    a table.
    """

    def __init__(self, verdicts: list[Verdict]):
        super().__init__()
        self.verdicts = verdicts

    @property
    def in_place(self) -> list[str]:
        """What is in place now, also if it was before: all that may be so in a copy of the
        model."""
        return [verdict.name for verdict in self.verdicts if verdict.in_place]

    def __repr__(self) -> str:
        rows = [(v.name, v.kind, "yes" if v.in_place else "no", v.reason) for v in self.verdicts]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{len(self.in_place)} of {len(rows)} activations in place"]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def apply_in_place_activations(
    model: nn.Module, *inputs, tolerance: float = 1e-4, **keyword_inputs
) -> InPlaceActivations:
    """Make in place the activations of a model that can be, and say of each why (not).

    Every module with an `inplace` switch (ReLU, LeakyReLU, ELU, SiLU, Dropout, ...) is tried on the
    model's own graph, by a forward and a backward pass with and without it. It stays on if autograd
    does not object and the outputs, gradients, buffers and inputs stay the same. Autograd alone is
    no judge: where an overwritten tensor is used again but was not saved, as by `x +
    activation(x)`, the result is wrong without an error. Switches that are on already are tried
    like the others, and turned off where they are wrong. Parameters, gradients, buffers and the
    random state stay as they are.

    The trial needs memory while it runs: what a step with the example batch keeps, and the
    gradients twice. Nothing of it stays. In a run that is measured it counts as building, not as
    the first step, and can be the peak: take an example of one or two samples.

    Args:
        model: The model. Call this in the mode, train() or eval(), that it will run in: an
            activation that changes nothing in this batch, as dropout in eval(), is not known and
            stays off.
        inputs: An example batch for the model's forward; a small one will do, of two samples with
            batch norm. It is copied.
        tolerance: The largest difference allowed between gradients, relative to a tensor's largest
            value. ELU and its relatives round differently in place, by about 1e-7 in FP32. All else
            has to be equal to the bit.
        keyword_inputs: What else the example batch has, by name.

    Returns:
        A handle: `names` of the switches that were changed, and `remove()`, which sets them back.
        Print it for a table of all activations.

    Raises:
        TypeError: `model` is no module.
        ValueError: The model's output has no gradient, or two runs of it differ.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    switches = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "inplace", None), bool)
    }
    before = {name: module.inplace for name, module in switches.items()}
    try:
        verdicts = _try_all(model, switches, inputs, keyword_inputs, tolerance)
    finally:
        for name, module in switches.items():
            module.inplace = before[name]
    handle = InPlaceActivations(verdicts)
    with handle.all_or_nothing():
        for verdict in verdicts:
            if verdict.in_place != before.get(verdict.name, False):
                module = switches[verdict.name]
                handle.replace(verdict.name, module, "inplace", verdict.in_place)
    return handle


def _try_all(model, switches: dict, inputs, keyword_inputs, tolerance) -> list[Verdict]:
    """Try one activation after the other, and leave those in place that can be."""
    for module in switches.values():
        module.inplace = False
    changing = _run_and_note_changes(model, switches, inputs, keyword_inputs)
    reference, saved = _run(model, inputs, keyword_inputs, count=True)
    what, difference = _compare(reference, _run(model, inputs, keyword_inputs)[0], tolerance)
    if what:
        raise ValueError(
            f"Two runs of this model as it is differ ({what} by {difference:.0e}), so nothing"
            " can be compared. Look for NaN, and try torch.use_deterministic_algorithms(True)."
        )
    verdicts = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if name not in switches:
            if type(module).__module__ == activation.__name__ and not any(module.children()):
                verdicts.append(Verdict(name, kind, False, 0, "has no in-place form"))
            continue
        if name not in changing:
            reason = "changes nothing with these inputs, so nothing is known of it"
            verdicts.append(Verdict(name, kind, False, 0, reason))
            continue
        module.inplace = True
        module.inplace, reason = _try(model, inputs, keyword_inputs, reference, tolerance)
        saved_less = 0
        if module.inplace:
            saved_now = _run(model, inputs, keyword_inputs, count=True)[1]
            saved_less = saved - saved_now
            saved = saved_now
            saves = f"saves {saved_less:,} bytes" if saved_less else "saves a temporary at most"
            reason = saves + reason
        verdicts.append(Verdict(name, kind, module.inplace, saved_less, reason))
    return verdicts


def _run_and_note_changes(model, switches: dict, inputs, keyword_inputs) -> set[str]:
    """Run the model; return which of the activations change their input, each time they run."""
    changes = {name: [] for name in switches}

    def note(name, module, args, output):
        changes[name].append(bool(args) and not torch.equal(args[0], output))

    hooks = []
    try:
        for name, module in switches.items():
            hooks.append(module.register_forward_hook(functools.partial(note, name)))
        _run(model, inputs, keyword_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, noted in changes.items() if noted and all(noted)}


def _try(model, inputs, keyword_inputs, reference, tolerance) -> tuple[bool, str]:
    """Whether the model, as its switches stand, does what it did, and the reason if not."""
    try:
        values, _ = _run(model, inputs, keyword_inputs)
    except RuntimeError as error:
        message = str(error)
        if "modified by an inplace operation" in message:
            return False, "autograd needs what it overwrites"
        if "inplace" in message or "in-place" in message:
            return False, f"autograd refuses it: {message.partition('. ')[0]}"
        raise
    what, difference = _compare(reference, values, tolerance)
    if what:
        change = f"{what} changes by {difference:.2g} of its largest value"
        return False, f"wrong without an error: {change}"
    return True, f"; gradients within {difference:.0e}" if difference else ""


def _run(
    model, inputs, keyword_inputs, count: bool = False
) -> tuple[dict[str, Tensor | None], int]:
    """Run forward and backward; return all that must stay the same, and the bytes that were saved.

    Bytes are counted on demand only: under hooks on saved tensors autograd notices no change in
    place.
    """
    given = (inputs, keyword_inputs)
    # A deep copy of a slice would copy the whole tensor that it is a slice of: clones take its
    # place.
    clones = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in _tensors(given)}
    args, kwargs = copy.deepcopy(given, clones)
    given = list(_tensors((args, kwargs)))
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        with torch.enable_grad(), torch.random.fork_rng(devices, device_type="cuda"):
            torch.manual_seed(0)
            counting = saved_tensors_hooks(pack, lambda tensor: tensor)
            with counting if count else contextlib.nullcontext():
                output = model(*args, **kwargs)
            outputs = [t for t in _tensors(output) if t.is_floating_point()]
            with_gradient = [t for t in outputs if t.requires_grad]
            if not with_gradient:
                raise ValueError(
                    "The output of the model has no gradient. Are all parameters frozen?"
                )
            # Cloned here: it is the output before backward that the caller gets.
            values = {f"output {i}": t.detach().clone() for i, t in enumerate(outputs)}
            values |= {f"input {i}": t.detach() for i, t in enumerate(given)}
            values |= {f"buffer {name}": buffer.clone() for name, (buffer, _) in buffers.items()}
            torch.manual_seed(1)
            # Every number of the output has its own weight in this loss, so no two can cancel.
            loss = sum(
                (t.float() * torch.rand_like(t, dtype=torch.float32)).sum() for t in with_gradient
            )
            leaves = {
                f"{_GRADIENT} {name}": p for name, p in model.named_parameters() if p.requires_grad
            }
            leaves |= {f"{_GRADIENT} input {i}": t for i, t in enumerate(given) if t.requires_grad}
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            values |= dict(zip(leaves, gradients, strict=True))
    finally:
        with torch.no_grad():
            for buffer, old in buffers.values():
                buffer.copy_(old)
    return values, sum(storages.values())


def _tensors(structure) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, dict | tuple | list):
        for item in structure.values() if isinstance(structure, dict) else structure:
            yield from _tensors(item)


def _compare(
    reference: dict[str, Tensor | None], values: dict[str, Tensor | None], tolerance: float
) -> tuple[str, float]:
    """What differs first ("" for nothing), and the largest difference that was met.

    Forward has to be the same to the last bit: in place or not, the same numbers are computed. A
    gradient below a hundredth of the model's largest is compared with that hundredth, not with
    itself: where the true one is zero, as of a bias before batch norm, there is only rounding to
    compare.
    """
    gradients = [t for name, t in reference.items() if name.startswith(_GRADIENT) and t is not None]
    floor = 0.01 * max([_size(t) for t in gradients], default=0.0)
    largest = 0.0
    for name, expected in reference.items():
        value = values.get(name)
        if expected is None and value is None:
            continue
        if expected is None or value is None or expected.shape != value.shape:
            return name, float("inf")
        if torch.equal(expected, value):
            continue
        is_gradient = name.startswith(_GRADIENT)
        size = max(_size(expected), floor) if is_gradient else _size(expected)
        difference = _size(value.double() - expected.double()) / (size or 1.0)
        if not is_gradient or not difference <= tolerance:  # NaN is no reason to go on
            return name, difference
        largest = max(largest, difference)
    return "", largest


def _size(tensor: Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0
