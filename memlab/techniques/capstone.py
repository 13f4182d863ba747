"""What only the whole recipe needs, when everything else is small: the start, and the tied
embedding.

Once activations, optimizer state and blocks are small, three things are left that no other
technique touches.
- The start: a model that is built in FP32 and then cast was there in FP32. `materialize` makes a
  model's tensors one after the other, each in its type and in its place.
- The output layer of a large vocabulary. `tiled_linear_cross_entropy` walks over its words, a tile
  at a time: no more than a tile of logits and of weights has to be near, and the weight's gradient
  is in the weight's type, and lies where the weight lies.
- The embedding that shares the output layer's weight. Autograd makes that gradient twice, once for
  each, and adds them up. With `apply_tied_embedding` the second is added into the first.
And where two techniques exclude each other without a word, `clip_gradient_norm` has one.

Sources: the walk over tiles with an online softmax is that of Dao et al., "FlashAttention" (2022),
arXiv:2205.14135, and, for this loss, of Wijmans et al., "Cut Your Losses in Large-Vocabulary
Language Models" (2024), arXiv:2411.09009; models without their first copy:
https://docs.pytorch.org/tutorials/recipes/recipes/module_load_state_dict_tips.html.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn

# --- The start ------------------------------------------------------------------------------------


@torch.no_grad()
def materialize(
    model: nn.Module, state: Mapping[str, Tensor], place: Callable[[str, Tensor], Tensor]
) -> None:
    """Give a model on the meta device its numbers, one tensor after the other: never more than one
    is there twice.

    >>> with torch.device("meta"):
    ...     model = GPT(config).to(torch.bfloat16)  # no memory yet
    >>> state = torch.load("weights.pt", mmap=True)  # stays in the file
    >>> materialize(model, state, lambda name, like: torch.empty_like(like, device="cuda"))

    state: numbers by name, as `state_dict()` has them; they are converted as they are copied.
    place: from a name and the meta tensor of that name to a tensor of its shape and dtype, where it
    shall lie.

    Raises ValueError for a model that is not on the meta device, for names that the state lacks (a
    buffer that is not saved, for one) and for another shape; TypeError when `place` returns another
    shape or dtype.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    if real := [name for name, tensor in named if not tensor.is_meta]:
        raise ValueError(
            f"{real[0]} has numbers already: make the model inside `with torch.device('meta')`."
        )
    for name, tensor in named:
        if name not in state:
            raise ValueError(
                f"The state has no {name}. If it is a buffer that is never saved, add it to the"
                " state."
            )
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, but the model needs {tuple(tensor.shape)}"
            raise ValueError(f"In the state {name} is {shapes}.")
    made = {}
    for name, tensor in named:
        real = place(name, tensor)
        fits = (
            isinstance(real, Tensor) and real.shape == tensor.shape and real.dtype == tensor.dtype
        )
        if not fits or real.is_meta:
            raise TypeError(
                f"place must return {tuple(tensor.shape)}, {tensor.dtype} for {name}, not"
                f" {real!r:.60}."
            )
        real.copy_(state[name])
        made[id(tensor)] = (
            nn.Parameter(real, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else real
        )
    for module in model.modules():  # a shared parameter has several places, and stays shared
        every = {"recurse": False, "remove_duplicate": False}  # also within one module
        for name, tensor in [*module.named_parameters(**every), *module.named_buffers(**every)]:
            setattr(module, name, made[id(tensor)])


# --- The loss, a tile of words at a time ----------------------------------------------------------


def tiled_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    tile_words: int = 512,
    gradient_like: Callable[[Tensor], Tensor] = torch.empty_like,
) -> Tensor:
    """Return `cross_entropy(linear(hidden, weight), targets)`, a scalar, with the logits of one
    tile of words at a time.

    The words are passed twice: for the softmax's denominators, and for the gradients, which are
    taken at once, in forward. That is one matrix product in four more than the plain loss has. A
    tile's part of the weight's gradient is one product over all tokens, and is rounded to the
    weight's type once. The rest is as in `cross_entropy`; the loss and the softmax are FP32 at
    least. The first backward pass uses the gradients up.

    hidden: (tokens, hidden). weight: (vocabulary, hidden); it may lie on the host while `hidden` is
    on a GPU. targets: int64 (tokens,). bias: none can be there. ignore_index: tokens with this
    target count for nothing, in the mean neither. reduction: "mean" over the tokens that count, or
    "sum". tile_words: so many words have logits and weights near at once. A logit is 4 bytes for
    each token, in 16 bits 6. gradient_like: makes the tensor for the weight's gradient from the
    weight, as `torch.empty_like` does.

    Raises TypeError or ValueError for other types, shapes, options or targets.
    """
    given = {"hidden": hidden, "weight": weight, "targets": targets}
    if (
        any(not isinstance(tensor, Tensor) for tensor in given.values())
        or targets.dtype != torch.int64
    ):
        raise TypeError("hidden, weight and targets must be tensors, and targets int64 indices.")
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif hidden.dtype != weight.dtype or not dtype.is_floating_point:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: convert one, or use autocast."
        )
    if dtype == torch.float16:
        raise TypeError(
            "In FP16 the sum over all tokens can pass the largest number: use BF16 or FP32."
        )
    if bias is not None:
        raise TypeError("An output layer with a bias is not known here: use one without.")
    if hidden.shape != (*targets.shape, *weight.shape[1:]) or weight.ndim != 2 or targets.ndim != 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        raise ValueError(
            "hidden (tokens, hidden), weight (words, hidden) and targets (tokens,) must fit:"
            f" {shapes}."
        )
    if type(tile_words) is not int or tile_words < 1 or reduction not in ("mean", "sum"):
        raise ValueError(
            'tile_words must be a positive int and reduction "mean" or "sum", but they are '
            f"{tile_words!r} and {reduction!r}."
        )
    if targets.device.type == "cpu":  # on a GPU looking would stop the queue
        wrong = targets[((targets < 0) | (targets >= len(weight))) & (targets != ignore_index)]
        if len(wrong):
            raise ValueError(
                f"Targets must be 0 to {len(weight) - 1} or {ignore_index}: one is"
                f" {wrong[0].item()}."
            )
    options = (ignore_index, reduction, tile_words, gradient_like, dtype, torch.is_grad_enabled())
    return _TiledLoss.apply(hidden, weight, targets, *options)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        targets,
        ignore_index,
        reduction,
        tile_words,
        gradient_like,
        dtype,
        learns,
    ):
        exact, device = torch.promote_types(dtype, torch.float32), hidden.device
        counts = (targets != ignore_index).unsqueeze(1)
        words, inputs = targets.unsqueeze(1).masked_fill(~counts, -1), hidden.to(dtype)

        def tile(first: int):
            """A tile's weights and logits, the tokens whose target is in it, and which of its words
            that is.
            """
            part = weight[first : first + tile_words].to(device, dtype)
            here = (words >= first) & (words < first + len(part))
            return part, (inputs @ part.T).to(exact), here, (words - first).masked_fill_(~here, 0)

        with torch.autocast(device.type, enabled=False):  # the types are chosen here
            largest = torch.full((len(hidden), 1), -torch.inf, dtype=exact, device=device)
            total, of_words = torch.zeros_like(largest), torch.zeros_like(largest)
            for first in range(0, len(weight), tile_words):
                part, logits, here, index = tile(first)
                of_words += logits.gather(1, index).masked_fill_(~here, 0)
                new = torch.maximum(largest, logits.amax(1, keepdim=True))
                total.mul_((largest - new).exp_()).add_(
                    logits.sub_(new).exp_().sum(1, keepdim=True)
                )
                largest = new
                del part, logits  # or they would still be there when the next ones are made
            denominator = total.log_().add_(largest)  # the log of the sum of exp
            count = counts.sum() if reduction == "mean" else counts.new_ones((), dtype=torch.int64)
            loss = (denominator - of_words).masked_fill_(~counts, 0).sum() / count
            wanted = [learns and needed for needed in ctx.needs_input_grad[:2]]
            of_hidden = torch.zeros_like(hidden, dtype=exact) if wanted[0] else None
            of_weight = gradient_like(weight) if wanted[1] else None
            for first in range(0, len(weight) if any(wanted) else 0, tile_words):
                part, logits, here, index = tile(first)
                # The gradient of the logits, in their place: the probabilities, less one at the
                # target.
                logits.sub_(denominator).exp_().scatter_add_(
                    1, index, -here.to(exact)
                ).masked_fill_(~counts, 0)
                of_logits = logits.to(dtype)
                del logits
                if of_weight is not None:
                    of_weight[first : first + len(part)] = of_logits.T @ inputs
                if (
                    of_hidden is not None
                ):  # a 16-bit product is converted before it is added: some tokens at a time
                    for rows, some in zip(
                        of_hidden.split(1024), of_logits.split(1024), strict=True
                    ):
                        rows += some @ part
                    del some  # a view of them
                del part, of_logits
        # Divided by the count in backward, with the gradient that comes in there.
        ctx.gradients = [None if of_hidden is None else of_hidden.to(hidden.dtype), of_weight]
        ctx.scale = 1 / count.clamp(min=1).to(exact)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tiled_linear_cross_entropy has no second derivative: no create_graph=True."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "The first backward pass used the gradients up: compute the loss again."
            )
        factor = gradient * ctx.scale
        # In place, and given away: autograd makes the same tensor `weight.grad`, without a copy.
        return (
            *(one if one is None else one.mul_(factor.to(one.device)) for one in gradients),
            *[None] * 7,
        )


# --- The tied embedding ---------------------------------------------------------------------------


def apply_tied_embedding(
    model: nn.Module, embedding: nn.Embedding | None = None, head: nn.Linear | None = None
) -> SimpleNamespace:
    """Let the gradient of a weight that is embedding and output layer be made once; `remove()`
    undoes it.

    The embedding hands its weight on to the output layer, so that the output layer's gradient comes
    to the embedding's backward, which adds its rows into it. Rows of one word are summed up in FP32
    first. The weight may lie on the host while the tokens are on a GPU.

    embedding, head: by default what `model.get_input_embeddings()` and
        `model.get_output_embeddings()` return (as all language models of Hugging Face have them),
        else `model.token_embedding` and `model.head`.

    Raises TypeError for other layers than `nn.Embedding` and `nn.Linear`, or an embedding with
    options that change its weight or gradient, and ValueError for layers that share no weight or
    have it already.
    """
    find = getattr(model, "get_input_embeddings", lambda: getattr(model, "token_embedding", None))
    embedding = find() if embedding is None else embedding
    find = getattr(model, "get_output_embeddings", lambda: getattr(model, "head", None))
    head = find() if head is None else head
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        found = f"{type(embedding).__name__} and {type(head).__name__}"
        raise TypeError(
            f"embedding and head must be an nn.Embedding and an nn.Linear, but they are {found}."
        )
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        raise TypeError(
            "The embedding has max_norm, scale_grad_by_freq or sparse: they cannot be kept."
        )
    if embedding.weight is not head.weight:
        raise ValueError(
            f"Embedding and output layer of this {type(model).__name__} share no weight."
        )
    if "forward" in vars(embedding):
        raise ValueError("The embedding's forward is replaced already: remove() that first.")
    forward, layer = _Lookup(embedding), weakref.ref(head)
    embedding.forward = forward

    def take(head: nn.Linear, _) -> None:
        if forward.handed_on is not None and torch.is_grad_enabled():
            vars(head)["weight"] = forward.handed_on  # found before the parameter of this name
        forward.handed_on = None

    def leave(head: nn.Linear, *_) -> None:
        vars(head).pop("weight", None)

    # Hooks, for they are called around whatever forward the output layer has or gets.
    hooks = [
        head.register_forward_pre_hook(take),
        head.register_forward_hook(leave, always_call=True),
    ]

    def remove() -> None:
        while hooks:
            hooks.pop().remove()
        for module, name in (
            (forward.embedding(), "forward"),
            (layer(), "weight"),
        ):  # left by a KeyboardInterrupt
            if module is not None:
                vars(module).pop(name, None)

    return SimpleNamespace(remove=remove)


class _Lookup:
    """The embedding's `forward`. It holds the embedding weakly: otherwise a deleted model would be
    a cycle.
    """

    def __init__(self, embedding: nn.Embedding):
        self.embedding, self.handed_on = weakref.ref(embedding), None

    def __call__(self, input: Tensor) -> Tensor:
        module = self.embedding()
        rows, weight = _TiedLookup.apply(
            module.weight, input, module.padding_idx, weakref.ref(self)
        )
        self.handed_on = weight if weight.requires_grad else None
        return rows

    def __reduce__(self):
        raise TypeError(
            "This model has a tied embedding applied: remove() it before copying or pickling."
        )


class _TiedLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, tokens, padding_idx, lookup):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tokens)
        ctx.padding_idx, ctx.lookup, ctx.weight_like = (
            padding_idx,
            lookup,
            (weight.shape, weight.dtype, weight.device),
        )
        rows = nn.functional.embedding(tokens.to(weight.device), weight)
        return rows.to(tokens.device), weight.view_as(weight)

    @staticmethod
    def backward(ctx, of_rows, of_weight):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A tied embedding has no second derivative: no create_graph=True, or remove() it."
            )
        if (
            lookup := ctx.lookup()
        ) is not None:  # what nobody has taken leads into a graph that is used up
            lookup.handed_on = None
        (tokens,) = ctx.saved_tensors
        shape, dtype, device = ctx.weight_like
        if of_weight is None:
            of_weight = torch.zeros(shape, dtype=dtype, device=device)
        if of_rows is not None:
            of_rows, tokens = of_rows.reshape(-1, shape[1]), tokens.flatten()
            if ctx.padding_idx is not None:
                of_rows = of_rows * (tokens != ctx.padding_idx).unsqueeze(1)
            words, position = tokens.unique(return_inverse=True)
            words, exact = words.to(device), torch.promote_types(dtype, torch.float32)
            # Some columns at a time, so that their FP32 sums are small.
            for part, rows in zip(of_weight.split(64, 1), of_rows.split(64, 1), strict=True):
                sums = torch.zeros(len(words), rows.shape[1], dtype=exact, device=rows.device)
                sums.index_add_(0, position, rows.to(exact))
                part[words] += sums.to(device, dtype)  # each word once
        return of_weight, None, None, None


# --- What does not compose ------------------------------------------------------------------------


def clip_gradient_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is `max_norm` at most, and return the norm that
    it was.

    It is `torch.nn.utils.clip_grad_norm_`, which returns 0 when there are no gradients, and clips
    nothing: an optimizer in backward has used each of them up before the last one was there.

    Raises RuntimeError when no parameter has a gradient or the norm is not finite, ValueError for
    another `max_norm` than a positive number.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not max_norm > 0:
        raise ValueError(f"max_norm must be a positive number, but it is {max_norm!r}.")
    if all(parameter.grad is None for parameter in parameters):
        raise RuntimeError(
            f"None of the {len(parameters)} parameters has a gradient, so there is no norm to clip."
            " An optimizer in backward steps with each gradient before the last one is known: it"
            " excludes clipping by the common norm. Clip each gradient by itself inside it, or"
            " step after backward."
        )
    return nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=True)
