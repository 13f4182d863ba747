"""In-place operations: write a result over a tensor that nobody needs any more, instead of beside
it.

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

import copy
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import activation

# --- Outside of autograd: an optimizer's step -----------------------------------------------------


class InPlaceAdamW(torch.optim.AdamW):
    """AdamW whose step needs no temporaries: it uses up the gradients, and sets each `.grad` to
    None.

    The updates are those of `torch.optim.AdamW(foreach=False)`, bit for bit, and either loads the
    other's `state_dict`. Read or clip gradients before the step. It works on one parameter at a
    time, which on a GPU is slower than `fused=True`: use that in production.

    Raises ValueError, before anything is changed, for a gradient that is sparse or complex or
    shares its memory with another one, and for a loaded state with amsgrad or maximize.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay=1e-2
    ):
        super().__init__(params, lr, betas, eps, weight_decay, foreach=False)

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient; return what `closure` returns, if there is
        one.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._check()
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                self._update(parameter, group)
                parameter.grad = None  # what it holds now is no gradient: nobody shall add to it
        return loss

    def _update(self, parameter: Tensor, group: dict) -> None:
        gradient, state, lr = parameter.grad, self.state[parameter], float(group["lr"])
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        mean, square, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
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
                gradient, shape = parameter.grad, tuple(parameter.shape)
                if gradient is None or not gradient.numel():
                    continue
                which = f"The gradient of a parameter of shape {shape}"
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


# --- Under autograd: a model's activations --------------------------------------------------------

_GRADIENT = "the gradient of"


class Verdict(NamedTuple):
    """What was found about one activation: its name in the model, its class, whether it is in place
    now, the bytes that autograd saves less with the inputs of the trial, and the reason in
    words."""

    name: str
    kind: str
    in_place: bool
    saved_bytes: int
    reason: str


class InPlaceActivations:
    """What `apply_in_place_activations` did: `verdicts`, one for each activation, and
    `remove()`.
    """

    def __init__(self, verdicts: list[Verdict], before: weakref.WeakKeyDictionary):
        self.verdicts, self._before = verdicts, before

    @property
    def names(self) -> list[str]:
        """What is in place now, for `model.get_submodule(name).inplace = True` in another copy of
        the model.
        """
        return [verdict.name for verdict in self.verdicts if verdict.in_place]

    def remove(self) -> None:
        """Set the switches back to where they were; a second call does nothing."""
        for module, inplace in self._before.items():
            module.inplace = inplace
        self._before.clear()

    def __repr__(self) -> str:
        rows = [(v.name, v.kind, "yes" if v.in_place else "no", v.reason) for v in self.verdicts]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(n) for cell, n in zip(row, wide, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([f"{len(self.names)} of {len(rows)} activations in place", *lines])


def apply_in_place_activations(
    model: nn.Module, *inputs, tolerance: float = 1e-4, **keyword_inputs
):
    """Make in place the activations of a model that can be, and say of each why (not).

    Every module with an `inplace` switch (ReLU, LeakyReLU, ELU, SiLU, Dropout, ...) is tried on the
    model's own graph, by a forward and a backward pass with and without it. It stays on if autograd
    does not object and the outputs, gradients, buffers and inputs stay the same. Autograd alone is
    no judge: where an overwritten tensor is used again but was not saved, as by `x +
    activation(x)`, the result is wrong without an error. Switches that are on already are tried
    like the others, and turned off where they are wrong.

    inputs, keyword_inputs: an example batch for the model's forward; a small one will do, of two
        samples with batch norm. It is copied. Call this in the mode, train() or eval(), that the
        model will run in: an activation that changes nothing in this batch, as dropout in eval(),
        is not known and stays off.
    tolerance: the largest difference allowed between gradients, relative to a tensor's largest
        value. ELU and its relatives round differently in place, by about 1e-7 in FP32. All else has
        to be equal to the bit.

    Returns an `InPlaceActivations`: print it for a table. Parameters, gradients, buffers and the
    random state stay as they are. Raises TypeError for a model that is no module, and ValueError
    when its output has no gradient or two runs of it differ.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    modules = dict(model.named_modules())
    switches = {
        name: m for name, m in modules.items() if isinstance(getattr(m, "inplace", None), bool)
    }
    before = weakref.WeakKeyDictionary({module: module.inplace for module in switches.values()})
    handle = InPlaceActivations([], before)
    try:
        for module in switches.values():
            module.inplace = False
        changes = {module: [] for module in switches.values()}

        def note_change(module, args, output):
            changes[module].append(bool(args) and not torch.equal(args[0], output))

        hooks = [module.register_forward_hook(note_change) for module in changes]
        try:
            reference, saved = _run(model, inputs, keyword_inputs, count=True)
        finally:
            for hook in hooks:
                hook.remove()
        what, difference = _compare(reference, _run(model, inputs, keyword_inputs)[0], tolerance)
        if what:
            raise ValueError(
                f"Two runs of this model as it is differ ({what} by {difference:.0e}), so nothing"
                " can be compared. Look for NaN, and try torch.use_deterministic_algorithms(True)."
            )
        for name, module in modules.items():
            kind, less = type(module).__name__, 0
            if name in switches:
                module.inplace = all(changes[module]) and bool(changes[module])
                reason = "changes nothing with these inputs, so nothing is known of it"
                if module.inplace:
                    module.inplace, reason = _try(
                        model, inputs, keyword_inputs, reference, tolerance
                    )
                if module.inplace:
                    now = _run(model, inputs, keyword_inputs, count=True)[1]
                    saved, less = now, saved - now
                    reason = (
                        f"saves {less:,} bytes" if less else "saves a temporary at most"
                    ) + reason
                handle.verdicts.append(Verdict(name, kind, module.inplace, less, reason))
            elif type(module).__module__ == activation.__name__ and not any(module.children()):
                handle.verdicts.append(Verdict(name, kind, False, 0, "has no in-place form"))
    except BaseException:
        handle.remove()
        raise
    return handle


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
        return (
            False,
            f"wrong without an error: {what} changes by {difference:.2g} of its largest value",
        )
    return True, f"; gradients within {difference:.0e}" if difference else ""


def _run(
    model, inputs, keyword_inputs, count: bool = False
) -> tuple[dict[str, Tensor | None], int]:
    """Run forward and backward; return all that must stay the same, by name, and the bytes that
    were saved.

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
            with saved_tensors_hooks(pack, lambda tensor: tensor) if count else nullcontext():
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
):
    """Whether all is the same, or else what differs first, and the largest difference that was met.

    Forward has to be the same to the last bit: in place or not, the same numbers are computed. A
    gradient below a hundredth of the model's largest is compared with that hundredth, not with
    itself: where the true one is zero, as of a bias before batch norm, there is only rounding to
    compare.
    """
    gradients = [t for name, t in reference.items() if name.startswith(_GRADIENT) and t is not None]
    floor, largest = 0.01 * max([_size(t) for t in gradients], default=0.0), 0.0
    for name, expected in reference.items():
        given, is_gradient = values.get(name), name.startswith(_GRADIENT)
        if expected is given or (
            expected is not None and given is not None and torch.equal(expected, given)
        ):
            continue
        if expected is None or given is None or expected.shape != given.shape:
            return name, float("inf")
        size = max(_size(expected), floor) if is_gradient else _size(expected)
        difference = _size(given.double() - expected.double()) / (size or 1.0)
        if not is_gradient or not difference <= tolerance:  # NaN is no reason to go on
            return name, difference
        largest = max(largest, difference)
    return "", largest


def _size(tensor: Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0
