"""Pruning: cut attention heads and MLP channels out of a model, so that its matrices become
smaller.

A mask of zeros saves nothing: zeros take as many bytes as other numbers. What saves is to take
whole rows and columns out of the matrices. A head and a channel of an MLP are such units: some
layers *make* it (rows of their weights), one layer *reads* it (columns). Cut both, and the model
computes what it did with the unit at zero. The residual stream keeps its width, so norms,
embeddings and what is tied to them stay as they are.

`score_units` says how much each unit matters, `prune_heads` and `prune_mlp` cut the lowest in every
layer. Prune first, and make the optimizer then.

Sources: Michel et al., "Are Sixteen Heads Really Better than One?" (2019), arXiv:1905.10650;
Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019), arXiv:1906.10771;
Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021), arXiv:2104.08378, for 2:4. In
production: Torch-Pruning, `torch.nn.utils.prune` (masks only),
`torch.sparse.to_sparse_semi_structured`.
"""

import contextlib
import functools
import gc
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What can be cut, known by the names of the layers that make the units and of the one that reads
# them.
_LAYOUTS = {
    "heads": (
        (("query_key_value",), "projection"),  # memlab's GPT and ViT
        (("c_attn",), "c_proj"),  # GPT-2
        (("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama, Mistral, Qwen, Gemma
    ),
    "channels": (
        (("expansion",), "projection"),
        (("c_fc",), "c_proj"),
        (("gate_proj", "up_proj"), "down_proj"),
    ),
}


class _Part(NamedTuple):
    """One attention or MLP: `units` of equal size. `makers` holds (layer, blocks): where one layer
    makes query, key and value, its rows are three blocks, each with a share of every unit."""

    module: nn.Module
    units: int
    makers: list[tuple[nn.Module, int]]
    reader: nn.Module


# --- How much a unit matters ----------------------------------------------------------------------


def score_units(model: nn.Module, kind: str, criterion: str = "magnitude") -> dict[str, Tensor]:
    """Return a score for each unit: the lower, the sooner it can go.

    Args:
        model: A model with layers that `prune_heads` or `prune_mlp` know.
        kind: "heads" or "channels". Where heads share keys and values, a unit is a group of them.
        criterion: "magnitude", the L2 norm of all the unit's weights, or "taylor", |sum of weight x
            gradient| over the weights that read the unit: to first order, by how much the loss
            changes when the unit goes (Molchanov et al., 2019; for a head it is the sensitivity of
            Michel et al., 2019). It reads `.grad`, so call `loss.backward()` before. Near a minimum
            the sum over many sequences is small, since its parts cancel: take the mean of the
            scores of single sequences then.

    Returns:
        By module name the scores, (units,).

    Raises:
        ValueError: The kind or criterion is unknown, the model has no such units, or gradients are
            not there.
        TypeError: `model` is no module.
    """
    scores = {}
    for name, part in _find(model, kind).items():
        if criterion == "magnitude":
            layers = [(layer, True, blocks) for layer, blocks in part.makers] + [
                (part.reader, False, 1)
            ]
            squares = [
                _by_unit(x.weight.detach().square(), x, out, n, part.units) for x, out, n in layers
            ]
            scores[name] = sum(square.sum((0, 2, 3)) for square in squares).sqrt()
        elif criterion == "taylor":
            weight = part.reader.weight
            if weight.grad is None:
                raise ValueError(
                    f"{name} has no gradient: call loss.backward() before, and zero_grad() after."
                )
            product = _by_unit(weight.detach() * weight.grad, part.reader, False, 1, part.units)
            scores[name] = product.sum((0, 2, 3)).abs()
        else:
            raise ValueError(f'criterion must be "magnitude" or "taylor", but it is {criterion!r}.')
    return scores


# --- Cutting --------------------------------------------------------------------------------------


def prune_heads(
    model: nn.Module, keep_fraction: float, scores: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Cut attention heads out of every layer, in place, and keep those with the highest scores.

    Knows the attention of memlab's GPT and ViT, of GPT-2 and of the Llama family, where a key-value
    head goes with all its query heads. Head counts of modules, and in the Llama family those of
    `model.config`, follow; the configs of the others cannot express it. Gradients of what is cut
    are dropped. An optimizer made before still holds the old weights: it refuses its next step.
    One that is made after, of a list of parameters from before, is refused.

    Args:
        model: The model to cut. There is no way back.
        keep_fraction: Above 0 and up to 1. Every layer keeps the same number, rounded, and at least
            one. The shapes depend on nothing else, so a checkpoint fits any model that was pruned
            by the same fraction.
        scores: As from `score_units(model, "heads")`, which is the default.

    Returns:
        The kept units by module name, int64 (kept,), ascending.

    Raises:
        TypeError: `model` is no module.
        ValueError: The fraction or the scores do not fit, there are no layers to cut, or they have
            adapters as of LoRA, or weights are masked or shared.
    """
    return _prune(model, "heads", keep_fraction, scores)


def prune_mlp(
    model: nn.Module, keep_fraction: float, scores: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Cut channels (inner features) out of every MLP, in place, and keep those of highest scores.

    Arguments, result and errors are those of `prune_heads`. Knows the MLPs of memlab's GPT and ViT,
    of GPT-2 and of the Llama family, in which a channel has two rows, in gate and up; `n_inner` or
    `intermediate_size` of `model.config` follows.
    """
    return _prune(model, "channels", keep_fraction, scores)


def _prune(model, kind, keep_fraction, scores):
    if (
        isinstance(keep_fraction, bool)
        or not isinstance(keep_fraction, int | float)
        or not 0 < keep_fraction <= 1
    ):
        raise ValueError(
            f"keep_fraction must be above 0 and at most 1, but it is {keep_fraction!r}."
        )
    parts = _find(model, kind)
    scores = score_units(model, kind) if scores is None else scores
    kept = {}
    causal = {}
    for name, part in parts.items():  # look at everything before anything is cut
        if name not in scores or scores[name].shape != (part.units,):
            raise ValueError(
                f"scores must hold ({part.units},) for {name}: take them from score_units."
            )
        count = max(1, round(part.units * keep_fraction))
        kept[name] = scores[name].topk(count).indices.sort().values
        written_for_all = hasattr(part.module, "query_key_value")
        if written_for_all and not _is_applied(part.module, _attend_with_fewer):
            causal[name] = _is_causal(part.module, name)
    _refuse_shared(model, parts)
    for name, part in parts.items():
        for layer, blocks in part.makers:
            _cut(layer, True, blocks, part.units, kept[name])
        _cut(part.reader, False, 1, part.units, kept[name])
        _note_count(part, kind, len(kept[name]))
        if name in causal:
            # The handle is let go: there is no way back.
            Handle().wrap_forward(
                name, part.module, _attend_with_fewer, causal[name], innermost=True
            )
    if kind == "channels" or all(len(part.makers) == 3 for part in parts.values()):
        _note_in_config(model, kind, list(parts.values()), {len(units) for units in kept.values()})
    _warn_optimizers()
    return kept


def _cut(layer: nn.Module, output: bool, blocks: int, units: int, kept: Tensor) -> None:
    """Give the layer new, smaller parameters.

    They are copies: a slice would keep the whole storage alive.
    """
    axis = _axis(layer, output)
    index = torch.arange(layer.weight.shape[axis], device=layer.weight.device)
    index = index.view(blocks, units, -1)[:, kept.to(index.device)].flatten()
    for name, along in (("weight", axis), ("bias", 0 if output else None)):
        old = getattr(layer, name)
        if old is None or along is None:
            continue
        new = old.detach().index_select(along, index)
        setattr(layer, name, nn.Parameter(new, old.requires_grad))
        if type(old) is nn.Parameter:
            old.__class__ = _CutParameter  # for an optimizer that holds it, or is given it
    if isinstance(layer, nn.Linear):
        size_name = "out_features" if output else "in_features"
    else:  # transformers' Conv1D
        size_name = "nf" if output else "nx"
    setattr(layer, size_name, len(index))


def _by_unit(tensor: Tensor, layer: nn.Module, output: bool, blocks: int, units: int) -> Tensor:
    """A weight, or something of its shape, as (blocks, units, rows of a unit, the other axis)."""
    tensor = tensor.movedim(_axis(layer, output), 0)
    return tensor.reshape(blocks, units, -1, tensor.shape[1])


def _axis(layer: nn.Module, output: bool) -> int:
    # nn.Linear keeps (out, in), transformers' Conv1D (in, out).
    return int(not output) if isinstance(layer, nn.Linear) else int(output)


def _attend_with_fewer(attention: nn.Module, forward, causal: bool, /, x: Tensor) -> Tensor:
    """The forward of memlab's attention for heads that no longer fill the hidden size."""
    parts = attention.query_key_value(x).chunk(3, dim=2)
    query, key, value = (part.unflatten(2, (attention.heads, -1)).transpose(1, 2) for part in parts)
    dropout = attention.dropout if attention.training else 0.0
    y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=causal)
    return attention.projection(y.transpose(1, 2).flatten(2))


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


# --- Finding what can be cut ----------------------------------------------------------------------


def _find(model: nn.Module, kind: str) -> dict[str, _Part]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    if kind not in _LAYOUTS:
        raise ValueError(f'kind must be "heads" or "channels", but it is {kind!r}.')
    parts = {}
    for name, module in model.named_modules():
        for makers, reader in _LAYOUTS[kind]:
            layers = [getattr(module, layer, None) for layer in (*makers, reader)]
            if all(isinstance(layer, nn.Module) for layer in layers):
                _refuse_other_layers(name, layers)
                parts[name] = _part(module, kind, layers)
                if not all(isinstance(layer.weight, nn.Parameter) for layer in layers):
                    raise ValueError(
                        f"{name} holds a masked weight: call torch.nn.utils.prune.remove first."
                    )
    if not parts:
        known = "; ".join(", ".join((*makers, reader)) for makers, reader in _LAYOUTS[kind])
        raise ValueError(
            f"{type(model).__name__} holds no {kind} to cut. A module needs the layers {known}."
        )
    return parts


def _refuse_other_layers(name: str, layers: list[nn.Module]) -> None:
    """Raise ValueError if a layer is none that can be cut, as those of a LoRA."""
    for layer in layers:
        if not isinstance(layer, nn.Linear) and not _is_conv1d(layer):
            where = type(layer).__module__
            raise ValueError(
                f"{name} holds a layer that cannot be cut, {where}.{type(layer).__name__}: it must"
                " be an nn.Linear. Prune before you add adapters such as LoRA, or merge them first"
                " (in PEFT: merge_and_unload())."
            )


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, which is told apart without importing it."""
    return type(layer).__name__ == "Conv1D"


def _part(module: nn.Module, kind: str, layers: list[nn.Module]) -> _Part:
    *makers, reader = layers
    if kind == "channels":
        return _Part(
            module, reader.weight.shape[_axis(reader, False)], [(x, 1) for x in makers], reader
        )
    if len(makers) == 1:  # one layer makes query, key and value
        heads = module.heads if hasattr(module, "heads") else module.num_heads
        return _Part(module, heads, [(makers[0], 3)], reader)
    return _Part(
        module, makers[1].out_features // module.head_dim, [(x, 1) for x in makers], reader
    )


def _is_causal(attention: nn.Module, name: str) -> bool:
    """Whether a position sees only what comes before: tried out, since the module does not say."""
    if getattr(attention, "attention", "sdpa") != "sdpa":
        raise ValueError(
            f"{name}: a pruned attention is computed by SDPA. Build the model with"
            ' attention="sdpa".'
        )
    weight = attention.query_key_value.weight
    probe = torch.arange(3 * weight.shape[1]).sin().view(1, 3, -1).to(weight)
    training = attention.training
    attention.eval()
    try:
        with torch.no_grad():
            expected = attention(probe)
            for causal in (True, False):
                found = _attend_with_fewer(attention, None, causal, probe)
                if (found - expected).norm() <= 0.02 * expected.norm():
                    return causal
    finally:
        attention.train(training)
    raise ValueError(f"{name} computes something else than softmax attention over query_key_value.")


def _refuse_shared(model: nn.Module, parts: dict[str, _Part]) -> None:
    cut = {
        id(x.weight)
        for part in parts.values()
        for x in (*(layer for layer, _ in part.makers), part.reader)
    }
    modules, seen = dict(model.named_modules(remove_duplicate=False)), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = modules[name.rpartition(".")[0]]
        first, other = seen.setdefault(id(parameter), (name, owner))
        if id(parameter) in cut and owner is not other:
            raise ValueError(
                f"{first} and {name} share one weight: cutting one of them would part them."
            )


def _note_count(part: _Part, kind: str, count: int) -> None:
    module = part.module
    if kind == "channels":
        if hasattr(module, "intermediate_size"):
            module.intermediate_size = count
    elif hasattr(module, "heads"):
        module.heads = count
    elif hasattr(module, "split_size"):  # GPT-2 divides what c_attn makes by it
        module.num_heads, module.split_size = count, count * module.head_dim


def _note_in_config(model: nn.Module, kind: str, parts: list[_Part], counts: set[int]) -> None:
    """Let a Hugging Face config say what the layers are now, as long as all are alike."""
    config = getattr(model, "config", None)
    if len(counts) > 1 or not hasattr(config, "to_dict"):
        return
    [count] = counts
    if kind == "channels":
        setattr(config, "n_inner" if hasattr(config, "n_inner") else "intermediate_size", count)
    else:
        query = parts[0].makers[0][0]
        config.head_dim = parts[0].module.head_dim  # no longer hidden size / heads
        config.num_key_value_heads = count
        config.num_attention_heads = query.out_features // config.head_dim


# --- An optimizer from before holds weights that are in no model ----------------------------------


class _CutParameter(nn.Parameter):
    """What a parameter is when pruning has replaced it: no optimizer takes it any more."""

    @property
    def is_leaf(self) -> bool:  # what every optimizer asks each parameter that it is given
        raise ValueError(
            "Pruning has replaced this parameter, so it is in no model and would not be trained:"
            " take the parameters from the model after pruning."
        )


def _warn_optimizers() -> None:
    """Let every optimizer that holds a parameter which was cut refuse its next step.

    Nobody knows which optimizers there are but Python's garbage collector.
    """
    for candidate in gc.get_objects():
        # By its type: an object may pretend to be of another class, and be made by the question.
        if issubclass(type(candidate), torch.optim.Optimizer) and _cut_parameters(candidate):
            candidate.register_step_pre_hook(_refuse_cut)


def _cut_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    groups = vars(optimizer).get("param_groups", ())  # there are none while it is being made
    return [p for group in groups for p in group["params"] if type(p) is _CutParameter]


def _refuse_cut(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if held := _cut_parameters(optimizer):
        raise RuntimeError(
            f"This optimizer holds {len(held)} parameters that pruning has replaced since: it would"
            " keep them in memory and not train the new ones. Make the optimizer after pruning."
        )


# --- Masks ----------------------------------------------------------------------------------------


def two_of_four(weight: Tensor) -> Tensor:
    """Return a mask of 2:4 sparsity: the two largest magnitudes in each four neighbours of a row.

    Args:
        weight: (out, in), with `in` a multiple of 4.

    Returns:
        A bool tensor (out, in), True for what is kept.

    Raises:
        ValueError: The weight has another shape.
    """
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise ValueError(
            f"weight must be (out, in) with in a multiple of 4, but it is {tuple(weight.shape)}."
        )
    fours = weight.detach().abs().unflatten(1, (-1, 4))
    mask = torch.zeros_like(fours, dtype=torch.bool)
    return mask.scatter_(2, fours.topk(2).indices, True).flatten(1)
