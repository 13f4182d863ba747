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

import gc
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
        ValueError: The fraction or the scores do not fit, there are no layers to cut, or weights
            are masked or shared.
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
        if hasattr(part.module, "query_key_value") and not isinstance(part.module, _CutAttention):
            causal[name] = _is_causal(part.module, name)
    _refuse_shared(model, parts)
    for name, part in parts.items():
        for layer, blocks in part.makers:
            _cut(layer, True, blocks, part.units, kept[name])
        _cut(part.reader, False, 1, part.units, kept[name])
        _note_count(part, kind, len(kept[name]))
        if name in causal:
            kind_of_module = type(part.module)
            part.module.__class__ = type(
                f"Cut{kind_of_module.__name__}",
                (_CutAttention, kind_of_module),
                {"_causal": causal[name]},
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
        old.was_cut = True  # for an optimizer that still holds it
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


class _CutAttention:
    """The forward of memlab's attention for heads that no longer fill the hidden size: a class
    before its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(x).chunk(3, dim=2)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=self._causal
        )
        return self.projection(y.transpose(1, 2).flatten(2))


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
            if all(isinstance(x, nn.Linear) or type(x).__name__ == "Conv1D" for x in layers):
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
    with torch.no_grad():
        expected = attention(probe)
        for attention._causal in (True, False):
            gap = (_CutAttention.forward(attention, probe) - expected).norm()
            if gap <= 0.02 * expected.norm():
                break
        else:
            raise ValueError(
                f"{name} computes something else than softmax attention over query_key_value."
            )
    attention.train(training)
    return vars(attention).pop("_causal")


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
    return [p for group in groups for p in group["params"] if hasattr(p, "was_cut")]


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
