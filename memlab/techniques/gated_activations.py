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

import itertools
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
# By name: the activation, the operator that differentiates it, and that operator's options.
_ACTIVATIONS = {
    "silu": (F.silu, aten.silu_backward, {}),
    "gelu": (F.gelu, aten.gelu_backward, {"approximate": "none"}),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), aten.gelu_backward, {"approximate": "tanh"}),
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
    """Return `linear(activation(gate) * up, weight, bias)`, keeping for backward only `gate` and
    `up`.

    gate, up: (..., inner), of one shape and dtype. Without `up` (None) it is
    `linear(activation(gate), ...)`. weight, bias: (hidden, inner) and (hidden,), as of
    `nn.Linear(inner, hidden)`. Returns (..., hidden). activation: "silu" (SwiGLU), "gelu" or
    "gelu_tanh" (GeGLU), "sigmoid" (GLU), "relu" (ReGLU).

    The gradients are those of the plain expression; they cost no matrix product more. Autocast and
    `torch.compile` are supported, second derivatives in eager mode. Raises ValueError for an
    unknown activation or shapes that do not fit, TypeError for gate and up not in one
    floating-point dtype.
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
        needed, given = ctx.needs_input_grad[:4], [None] * 4  # of gate, up, weight, bias
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Somebody differentiates the gradient: compute it with a graph, and nothing in place.
            output = F.linear(activate(gate) if up is None else activate(gate) * up, weight, bias)
            inputs = itertools.compress(ctx.saved_tensors, needed)
            found = iter(torch.autograd.grad(output, list(inputs), gradient, create_graph=True))
            return *(next(found) if need else None for need in needed), None

        # Under autocast the product was cast for the linear layer, and so was the weight: cast them
        # again.
        rows, dtype = gradient.reshape(-1, gradient.shape[-1]), gradient.dtype
        activated = activate(gate)
        if needed[3]:
            given[3] = rows.sum(0).to(bias.dtype)
        if needed[2]:
            product = activated if up is None else activated * up
            given[2] = (rows.T @ product.reshape(-1, product.shape[-1]).to(dtype)).to(weight.dtype)
            del product
        if not needed[1]:
            del activated
        if needed[0] or needed[1]:
            of_product = (gradient @ weight.to(dtype)).to(gate.dtype)
            if needed[1]:
                given[1] = activated.mul_(of_product)  # written over what is needed no more
            if needed[0]:
                of_activated = of_product if up is None else of_product.mul_(up)
                known = torch.sigmoid(gate) if ctx.activation == "sigmoid" else gate
                given[0] = differentiate.grad_input(
                    of_activated, known, **options, grad_input=of_activated
                )
        return *given, None


# --- A gated MLP, and how wide it has to be -------------------------------------------------------


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`, as it is usually written: (..., hidden) to the same.

    activation: as for `gated_linear`. Raises ValueError for an unknown one or a size below 1.
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
    """The width at which a gated MLP has as many parameters as a plain one of these sizes: 2/3 of
    `inner`.

    Round it to a multiple of 8 or more for fast 16-bit products. Raises ValueError for a size below
    1.
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
        gate, down = mlp.get_submodule(self.gate)(x), mlp.get_submodule(self.down)
        up = (
            None
            if self.up is None
            else mlp.get_submodule(self.up)(x)
            if self.up != self.gate
            else gate
        )
        if up is gate:
            halves = gate.chunk(2, dim=-1)
            gate, up = halves[self.half], halves[1 - self.half]
        return gated_linear(gate, up, down.weight, down.bias, self.activation)


class _Recomputing:
    """The `forward` of a changed MLP, as a class before the MLP's own: a copy of the model is
    changed too, and no cycle of references keeps a deleted model in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return self._layout.compute(self, x)


def apply_gated_recomputation(model: nn.Module):
    """Let a model's MLPs keep for backward no more than the activation's input and the factor
    beside it.

    An MLP is a module of two or three `nn.Linear` and at most one activation that computes
    `down(act(gate(x)) * up(x))`, the same with one layer for gate and up, or `down(act(up(x)))`.
    Its names do not matter: each form is tried on a few random numbers, and one has to give the
    same bits, in train() and eval(). Others, as an MLP with dropout inside, stay as they are. Hooks
    on the last layer are not called.

    Returns a handle: `names`, of the changed MLPs, and `remove()`. Raises TypeError for a model
    that is no module, ValueError when no MLP is found; `remove()` RuntimeError if an MLP's class
    was changed since.
    """
    found, changed = _find(model), []
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no MLP that could be changed: two or three nn.Linear in"
            f" a module, no dropout, weights other than zero, and one of {', '.join(_ACTIVATIONS)}."
        )
    for mlp, (_, layout) in found.items():
        own = type(mlp)
        mlp.__class__ = type(f"Recomputing{own.__name__}", (_Recomputing, own), {"_layout": layout})
        changed.append((mlp, own, type(mlp)))

    def remove() -> None:
        if any(type(mlp) is not ours for mlp, _, ours in changed):
            raise RuntimeError("Something changed the class of an MLP since: undo that first.")
        for mlp, own, _ in changed:
            mlp.__class__ = own
        changed.clear()

    return SimpleNamespace(names=[name for name, _ in found.values()], remove=remove)


def apply_gated_mlp(model: nn.Module, activation: str = "silu", inner: int | None = None):
    """Put a new `GatedMLP` in the place of each plain MLP. It is another model then, to be trained
    anew.

    inner: the width inside; None takes `gated_width`. Weights are drawn with the standard deviation
    of those that they replace, biases are zero. Call it before the optimizer is made.

    Returns a handle: `names`, of the new MLPs, and `remove()`, which puts the old ones back. Raises
    TypeError for a model that is no module and ValueError for an unknown activation, a size below 1
    or no plain MLP.
    """
    _activation(activation)
    _check_sizes(inner=1 if inner is None else inner)
    new = {}
    for mlp, (name, layout) in _find(model).items():
        first, last = mlp.get_submodule(layout.gate), mlp.get_submodule(layout.down)
        hidden, bias = first.in_features, last.bias is not None
        if not name or layout.up or last.out_features != hidden:
            continue
        width = inner or gated_width(hidden, first.out_features, bias)
        with first.weight.device:
            gated = GatedMLP(hidden, width, activation, bias)
        for layer, before in ((gated.gate, first), (gated.up, first), (gated.down, last)):
            nn.init.normal_(layer.weight, std=before.weight.std().item())
            if bias:
                nn.init.zeros_(layer.bias)
        new[mlp] = gated.to(first.weight).train(mlp.training)
    old = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if m in new]
    for name, mlp in old:
        model.set_submodule(name, new[mlp])
    if not old:
        raise ValueError(
            f"{type(model).__name__} holds no plain MLP, down(act(up(x))), to be replaced."
        )

    def remove() -> None:
        for name, mlp in old:
            model.set_submodule(name, mlp)
        old.clear()

    return SimpleNamespace(names=[name for name, _ in old], remove=remove)


def _find(model: nn.Module) -> dict[nn.Module, tuple[str, _Layout]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    found = {module: (name, _recognise(module)) for name, module in model.named_modules()}
    return {module: (name, layout) for module, (name, layout) in found.items() if layout}


def _recognise(module: nn.Module) -> _Layout | None:
    children = dict(module.named_children())
    linears = [name for name, child in children.items() if type(child) is nn.Linear]
    weights = {id(p) for name in linears for p in children[name].parameters()}
    if (
        len(linears) not in (2, 3)
        or len(children) > len(linears) + 1
        or isinstance(module, _Recomputing)
    ):
        return None
    # A forward on the instance, as checkpointing puts it there, would go before that of the class.
    if "forward" in vars(module) or any(id(p) not in weights for p in module.parameters()):
        return None
    like, generator = children[linears[0]].weight, torch.Generator().manual_seed(0)
    # Large numbers too, since some MLPs clamp what goes into their activation.
    probe = torch.randn(3, like.shape[1], generator=generator) * torch.tensor(
        [[1.0], [30.0], [1000.0]]
    )
    probe, layouts = probe.to(like), list(_layouts(linears))
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
