"""Gated activations: GeGLU, SwiGLU and their relatives, and a backward that keeps less of them.

A gated MLP computes `down(activation(gate(x)) * up(x))`. Of the wide tensors inside, autograd keeps
four: the gate, the gate after its activation, the other factor, and their product. Two of them
follow from the others without a matrix product, so `gated_linear` keeps the gate and the factor,
and computes the rest again in backward, to the same bits. `apply_gated_recomputation` brings this
to the MLPs of a model; plain ones then keep one wide tensor instead of two. `apply_gated_mlp` puts
gated MLPs in the place of plain ones.

Sources: Dauphin et al., "Language Modeling with Gated Convolutional Networks" (2017),
arXiv:1612.08083; Shazeer, "GLU Variants Improve Transformer" (2020), arXiv:2002.05202. In
production: `torch.compile`, which finds the same by itself, or `torch.utils.checkpoint` around the
activation and the last layer.
"""

import contextlib
import functools
import inspect
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
# By name: the activation, the operator that differentiates it, and that operator's options.
_ACTIVATIONS = {
    "silu": (F.silu, aten.silu_backward, {}),
    "gelu": (F.gelu, aten.gelu_backward, {"approximate": "none"}),
    "gelu_tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        aten.gelu_backward,
        {"approximate": "tanh"},
    ),
    "sigmoid": (torch.sigmoid, aten.sigmoid_backward, {}),
    "relu": (F.relu, aten.threshold_backward, {"threshold": 0}),
}


def _activation(name: str):
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(_ACTIVATIONS)}, but it is {name!r}."
        )
    return _ACTIVATIONS[name][0]


# --- The idea: the last layer of an MLP, with the activation before it ----------------------------


def gated_linear(
    gate: Tensor, up: Tensor | None, weight: Tensor, bias=None, activation="silu"
) -> Tensor:
    """Return `linear(activation(gate) * up, weight, bias)`, keeping only `gate` and `up`.

    The gradients are those of the plain expression; they cost no matrix product more. Autocast and
    `torch.compile` are supported, second derivatives in eager mode.

    Args:
        gate: (..., inner).
        up: Of the same shape and dtype; None computes `linear(activation(gate), ...)`.
        weight: (hidden, inner), as of `nn.Linear(inner, hidden)`.
        bias: (hidden,), or None.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "sigmoid" (GLU), "relu" (ReGLU).

    Returns:
        (..., hidden).

    Raises:
        ValueError: The activation is unknown, or shapes do not fit.
        TypeError: Gate and up are not of one floating-point dtype.
    """
    _activation(activation)
    if not gate.is_floating_point() or (up is not None and up.dtype != gate.dtype):
        dtypes = gate.dtype if up is None else f"{gate.dtype} and {up.dtype}"
        raise TypeError(
            f"gate and up must be floating point and of one dtype, but they are {dtypes}."
        )
    shape = tuple(gate.shape)
    if up is not None and up.shape != gate.shape:
        raise ValueError(
            f"gate and up must have one shape, but they are {shape} and {tuple(up.shape)}."
        )
    if weight.ndim != 2 or gate.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"weight must be (hidden, inner), but it is {tuple(weight.shape)} and gate {shape}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), but its shape is {tuple(bias.shape)}.")
    return _GatedLinear.apply(gate, up, weight, bias, activation)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight, bias, activation):
        ctx.save_for_backward(gate, up, weight, bias)
        ctx.activation = activation
        product = _activation(activation)(gate)
        if up is not None:
            product.mul_(up)  # in place: nobody else has the activation's output
        return F.linear(product, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        gate, up, weight, bias = ctx.saved_tensors
        activate, differentiate, options = _ACTIVATIONS[ctx.activation]
        needed = ctx.needs_input_grad[:4]  # of gate, up, weight, bias
        gradients = [None] * 4
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Somebody differentiates the gradient: compute it with a graph, and nothing in place.
            output = F.linear(activate(gate) if up is None else activate(gate) * up, weight, bias)
            inputs = itertools.compress(ctx.saved_tensors, needed)
            found = iter(torch.autograd.grad(output, list(inputs), gradient, create_graph=True))
            return *(next(found) if need else None for need in needed), None

        # Under autocast the product was cast for the linear layer, and so was the weight: cast them
        # again.
        rows = gradient.reshape(-1, gradient.shape[-1])
        dtype = gradient.dtype
        activated = activate(gate)
        if needed[3]:
            gradients[3] = rows.sum(0).to(bias.dtype)
        if needed[2]:
            product = activated if up is None else activated * up
            columns = product.reshape(-1, product.shape[-1]).to(dtype)
            gradients[2] = (rows.T @ columns).to(weight.dtype)
            del columns
            del product
        if not needed[1]:
            del activated
        if needed[0] or needed[1]:
            of_product = (gradient @ weight.to(dtype)).to(gate.dtype)
            if needed[1]:
                gradients[1] = activated.mul_(of_product)  # written over what is needed no more
            if needed[0]:
                of_activated = of_product if up is None else of_product.mul_(up)
                known = torch.sigmoid(gate) if ctx.activation == "sigmoid" else gate
                gradients[0] = differentiate.grad_input(
                    of_activated, known, **options, grad_input=of_activated
                )
        return *gradients, None


# --- A gated MLP, and how wide it has to be -------------------------------------------------------


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`, as it is usually written: (..., hidden) to the same.

    Args:
        hidden: The width outside.
        inner: The width inside.
        activation: As for `gated_linear`.
        bias: Whether the layers have one.

    Raises:
        ValueError: The activation is unknown, or a size below 1.
    """

    def __init__(self, hidden: int, inner: int, activation: str = "silu", bias: bool = False):
        super().__init__()
        _activation(activation)
        _check_sizes(hidden=hidden, inner=inner)
        self.activation = activation
        self.gate = nn.Linear(hidden, inner, bias)
        self.up = nn.Linear(hidden, inner, bias)
        self.down = nn.Linear(inner, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_ACTIVATIONS[self.activation][0](self.gate(x)) * self.up(x))


def gated_width(hidden: int, inner: int, bias: bool = False) -> int:
    """Return the width at which a gated MLP has the parameters of a plain one: 2/3 of `inner`.

    Round it to a multiple of 8 or more for fast 16-bit products.

    Args:
        hidden: The plain one's width outside.
        inner: Its width inside.
        bias: Whether its layers have one.

    Raises:
        ValueError: A size is below 1.
    """
    _check_sizes(hidden=hidden, inner=inner)
    plain = 2 * hidden * inner + (inner if bias else 0)  # the last bias is the same in both
    return max(1, round(plain / (3 * hidden + (2 if bias else 0))))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, but it is {size!r}.")


# --- Applying it from outside ---------------------------------------------------------------------


class _Layout(NamedTuple):
    """An MLP's layers by name (`up` is None in a plain one), its activation and, where one layer
    makes both the gate and the other factor, which half is the gate."""

    gate: str
    up: str | None
    down: str
    activation: str
    half: int = 0

    def compute(self, mlp: nn.Module, x: Tensor) -> Tensor:
        gate = mlp.get_submodule(self.gate)(x)
        down = mlp.get_submodule(self.down)
        up = None
        if self.up == self.gate:
            halves = gate.chunk(2, dim=-1)
            gate = halves[self.half]
            up = halves[1 - self.half]
        elif self.up is not None:
            up = mlp.get_submodule(self.up)(x)
        return gated_linear(gate, up, down.weight, down.bias, self.activation)


def apply_gated_recomputation(model: nn.Module) -> "Handle":
    """Let the MLPs of a model keep for backward the activation's input and the factor beside it.

    An MLP is a module of two or three `nn.Linear` and at most one activation that computes
    `down(act(gate(x)) * up(x))`, the same with one layer for gate and up, or `down(act(up(x)))`.
    Its names do not matter: each form is tried on a few random numbers, and one has to give the
    same bits, in train() and eval(). Others stay as they are, as an MLP with dropout inside, or one
    whose forward is replaced already. Hooks on the last layer are not called.

    Args:
        model: The model whose MLPs are changed, or one MLP.

    Returns:
        A handle: `names` of the MLPs, and `remove()`, which undoes it.

    Raises:
        TypeError: `model` is no module.
        ValueError: It holds no such MLP.
    """
    found = _find(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no MLP that could be changed: two or three nn.Linear in"
            f" a module, no dropout, weights other than zero, and one of {', '.join(_ACTIVATIONS)}."
        )
    handle = Handle()
    with handle.all_or_nothing():
        for mlp, (name, layout) in found.items():
            handle.wrap_forward(name, mlp, _run_recomputing, layout, for_backward=True)
    return handle


def _run_recomputing(module, forward, layout, /, x: Tensor) -> Tensor:
    return layout.compute(module, x)  # what `forward` does: `_recognise` has tried it


def apply_gated_mlp(
    model: nn.Module, activation: str = "silu", inner: int | None = None
) -> "Handle":
    """Put a new `GatedMLP` in the place of each plain MLP.

    It is another model then, to be trained anew. Weights are drawn with the standard deviation of
    those that they replace, biases are zero. Call it before the optimizer is made.

    Args:
        model: The model that holds the MLPs.
        activation: As for `gated_linear`.
        inner: The width inside; None takes `gated_width`.

    Returns:
        A handle: `names` of the new MLPs, and `remove()`, which puts the old ones back.

    Raises:
        TypeError: `model` is no module.
        ValueError: The activation is unknown, `inner` is below 1, or there is no plain MLP.
    """
    _activation(activation)
    _check_sizes(inner=1 if inner is None else inner)
    new = {}
    for mlp, (name, layout) in _find(model).items():
        width = mlp.get_submodule(layout.down).out_features
        if name and not layout.up and width == mlp.get_submodule(layout.gate).in_features:
            new[mlp] = _gated_like(mlp, layout, activation, inner)
    if not new:
        raise ValueError(
            f"{type(model).__name__} holds no plain MLP, down(act(up(x))), to be replaced."
        )
    places = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if m in new]
    handle = Handle()
    with handle.all_or_nothing():
        for name, mlp in places:
            parent, _, attribute = name.rpartition(".")
            handle.replace(name, model.get_submodule(parent), attribute, new[mlp])
    return handle


def _gated_like(mlp: nn.Module, layout: _Layout, activation: str, inner: int | None) -> GatedMLP:
    """A new gated MLP of a plain one's hidden size, device, dtype and mode."""
    first = mlp.get_submodule(layout.gate)
    last = mlp.get_submodule(layout.down)
    hidden = last.out_features
    bias = last.bias is not None
    width = inner or gated_width(hidden, first.out_features, bias)
    with first.weight.device:
        gated = GatedMLP(hidden, width, activation, bias)
    for layer, before in ((gated.gate, first), (gated.up, first), (gated.down, last)):
        nn.init.normal_(layer.weight, std=before.weight.std().item())
        if bias:
            nn.init.zeros_(layer.bias)
    return gated.to(first.weight).train(mlp.training)


def _find(model: nn.Module) -> dict[nn.Module, tuple[str, _Layout]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    found = {module: (name, _recognise(module)) for name, module in model.named_modules()}
    return {module: (name, layout) for module, (name, layout) in found.items() if layout}


def _recognise(module: nn.Module) -> _Layout | None:
    children = dict(module.named_children())
    linears = [name for name, child in children.items() if type(child) is nn.Linear]
    weights = {id(p) for name in linears for p in children[name].parameters()}
    if len(linears) not in (2, 3) or len(children) > len(linears) + 1:
        return None
    # What is replaced already, as by checkpointing, may do more than its class says.
    if "forward" in vars(module) or any(id(p) not in weights for p in module.parameters()):
        return None
    like = children[linears[0]].weight
    generator = torch.Generator().manual_seed(0)
    # Large numbers too, since some MLPs clamp what goes into their activation.
    sizes = torch.tensor([[1.0], [30.0], [1000.0]])
    probe = (torch.randn(3, like.shape[1], generator=generator) * sizes).to(like)
    layouts = list(_layouts(linears))
    modes = {m: m.training for m in module.modules()}
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.no_grad(), torch.random.fork_rng(gpus, device_type="cuda"):
            for training in (True, False):
                expected = module.train(training)(probe)
                layouts = [
                    layout for layout in layouts if _computes(layout, module, probe, expected)
                ]
    except Exception:  # it takes something else than one tensor, or none of this size: no MLP
        return None
    finally:
        for m, training in modes.items():
            m.training = training
    return layouts[0] if len(layouts) == 1 else None  # with weights of zero any activation fits


def _layouts(linears: list[str]) -> Iterator[_Layout]:
    for (gate, *up, down), activation in itertools.product(
        itertools.permutations(linears), _ACTIVATIONS
    ):
        if up:
            yield _Layout(gate, *up, down, activation)
        else:
            yield _Layout(gate, None, down, activation)
            yield from (_Layout(gate, gate, down, activation, half) for half in (0, 1))


def _computes(layout: _Layout, module: nn.Module, probe: Tensor, expected: Tensor) -> bool:
    try:
        return torch.allclose(
            layout.compute(module, probe), expected, rtol=0, atol=0, equal_nan=True
        )
    except (IndexError, RuntimeError, ValueError):  # the shapes do not fit
        return False


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
