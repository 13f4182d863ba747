"""A large vocabulary: the loss a tile of words at a time, and a tied embedding's gradient made
once.

Once activations, optimizer state and blocks are small, the output layer of a large vocabulary is
what is left.
- `tiled_linear_cross_entropy` walks over the words, a tile at a time: no more than a tile of logits
  and of weights has to be near, and the weight's gradient is in the weight's type, and lies where
  the weight lies.
- The embedding often shares the output layer's weight. Autograd makes that gradient twice, once for
  each, and adds them up. With `apply_tied_embedding` the second is added into the first.

Sources: the walk over tiles with an online softmax is that of Dao et al., "FlashAttention" (2022),
arXiv:2205.14135, and, for this loss, of Wijmans et al., "Cut Your Losses in Large-Vocabulary
Language Models" (2024), arXiv:2411.09009; the shared weight is that of Press and Wolf, "Using the
Output Embedding to Improve Language Models" (2016), arXiv:1608.05859.
"""

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: A product in 16 bits is converted before it is added to a sum in FP32: so many tokens at a time.
TOKENS_AT_ONCE = 1024

#: The sums of the rows of the embedding are FP32, and small: so many columns at a time.
COLUMNS_AT_ONCE = 64

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
    """Return `cross_entropy(linear(hidden, weight), targets)` with the logits of one tile of words
    at a time.

    The words are passed twice: for the softmax's denominators, and for the gradients, which are
    taken at once, in forward. That is one matrix product in four more than the plain loss has. A
    tile's part of the weight's gradient is one product over all tokens, and is rounded to the
    weight's type once. The rest is as in `cross_entropy`; the loss and the softmax are FP32 at
    least. The first backward pass uses the gradients up.

    Args:
        hidden: The output layer's input, `(tokens, hidden)`.
        weight: The output layer's weight, `(vocabulary, hidden)`. It may lie on the host while
            `hidden` is on a GPU.
        targets: The words that are to be predicted, int64 `(tokens,)`.
        bias: None; an output layer with a bias is refused.
        ignore_index: Tokens with this target count for nothing, in the mean neither.
        reduction: "mean" over the tokens that count, or "sum".
        tile_words: So many words have logits and weights near at once. A logit is 4 bytes for each
            token, in 16 bits 6.
        gradient_like: Makes the tensor for the weight's gradient from the weight, as
            `torch.empty_like` does.

    Returns:
        The loss, a scalar.

    Raises:
        TypeError: Other types than these, FP16, or a bias.
        ValueError: Shapes that do not fit, other options, or a target that is no word.
    """
    dtype = _compute_dtype(hidden, weight, targets, bias)
    _check_values(hidden, weight, targets, ignore_index, reduction, tile_words)
    learns = torch.is_grad_enabled()
    settings = _Settings(ignore_index, reduction, tile_words, gradient_like, dtype, learns)
    return _TiledLoss.apply(hidden, weight, targets, settings)


class _Settings(NamedTuple):
    ignore_index: int
    reduction: str
    tile_words: int
    gradient_like: Callable[[Tensor], Tensor]
    dtype: torch.dtype  # of the matrix products
    learns: bool


def _compute_dtype(hidden: Tensor, weight: Tensor, targets: Tensor, bias: None) -> torch.dtype:
    """Return the dtype of the matrix products. Raises TypeError for dtypes that do not fit."""
    tensors = (hidden, weight, targets)
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or targets.dtype != torch.int64:
        raise TypeError("hidden, weight and targets must be tensors, and targets int64 indices.")
    dtype = hidden.dtype
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
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
    return dtype


def _check_values(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    tile_words: int,
) -> None:
    if hidden.shape != (*targets.shape, *weight.shape[1:]) or weight.ndim != 2 or targets.ndim != 1:
        raise ValueError(
            "hidden (tokens, hidden), weight (words, hidden) and targets (tokens,) must fit: hidden"
            f" {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}."
        )
    if type(tile_words) is not int or tile_words < 1 or reduction not in ("mean", "sum"):
        raise ValueError(
            'tile_words must be a positive int and reduction "mean" or "sum", but they are '
            f"{tile_words!r} and {reduction!r}."
        )
    # On a GPU looking at the values would stop the queue.
    if targets.device.type == "cpu":
        outside = (targets < 0) | (targets >= len(weight))
        wrong = targets[outside & (targets != ignore_index)]
        if len(wrong):
            raise ValueError(
                f"Targets must be 0 to {len(weight) - 1} or {ignore_index}: one is"
                f" {wrong[0].item()}."
            )


class _TiledLoss(torch.autograd.Function):
    """The loss, and in the same forward its gradients, which backward scales and hands over."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, settings):
        tiles = _Tiles(hidden, weight, targets, settings)
        counts = tiles.counts
        # The types are chosen here: no autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            largest, sums, target_logits = tiles.softmax_sums()
            denominator = sums.log_().add_(largest)  # the log of the sum of exp
            if settings.reduction == "mean":
                divisor = counts.sum()
            else:
                divisor = counts.new_ones((), dtype=torch.int64)
            loss = (denominator - target_logits).masked_fill_(~counts, 0).sum() / divisor

            hidden_learns, weight_learns, *_ = ctx.needs_input_grad
            hidden_gradient = weight_gradient = None
            if settings.learns and hidden_learns:
                hidden_gradient = torch.zeros_like(hidden, dtype=tiles.sum_dtype)
            if settings.learns and weight_learns:
                weight_gradient = settings.gradient_like(weight)
            if hidden_gradient is not None or weight_gradient is not None:
                tiles.write_gradients(denominator, hidden_gradient, weight_gradient)
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        # Divided in backward, together with the gradient that comes in there.
        ctx.gradients = [hidden_gradient, weight_gradient]
        ctx.scale = 1 / divisor.clamp(min=1).to(tiles.sum_dtype)
        return loss

    @staticmethod
    def backward(ctx, loss_gradient):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tiled_linear_cross_entropy has no second derivative: no create_graph=True."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "The first backward pass used the gradients up: compute the loss again."
            )
        factor = loss_gradient * ctx.scale
        # In place, and given away: autograd makes the same tensor `weight.grad`, without a copy.
        scaled = [
            None if gradient is None else gradient.mul_(factor.to(gradient.device))
            for gradient in gradients
        ]
        return *scaled, None, None


class _Tiles:
    """The two walks over the words, a tile of the output layer at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, settings: _Settings):
        self.weight = weight
        self.tile_words = settings.tile_words
        self.dtype = settings.dtype
        self.sum_dtype = torch.promote_types(settings.dtype, torch.float32)
        # (tokens, 1): which tokens count, and their targets; -1 is in no tile
        self.counts = (targets != settings.ignore_index).unsqueeze(1)
        self.targets = targets.unsqueeze(1).masked_fill(~self.counts, -1)
        self.inputs = hidden.to(settings.dtype)

    def tile(self, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a tile's weights and logits, the tokens whose target is in it, and which of its
        words that is.
        """
        weights = self.weight[first : first + self.tile_words].to(self.inputs.device, self.dtype)
        inside = (self.targets >= first) & (self.targets < first + len(weights))
        logits = (self.inputs @ weights.T).to(self.sum_dtype)
        return weights, logits, inside, (self.targets - first).masked_fill_(~inside, 0)

    def softmax_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return each token's largest logit, its sum of exp(logit - largest), and its target's
        logit: all `(tokens, 1)`.
        """
        shape = (len(self.inputs), 1)
        device = self.inputs.device
        largest = torch.full(shape, -torch.inf, dtype=self.sum_dtype, device=device)
        sums = torch.zeros_like(largest)
        target_logits = torch.zeros_like(largest)
        for first in range(0, len(self.weight), self.tile_words):
            weights, logits, inside, index = self.tile(first)
            target_logits += logits.gather(1, index).masked_fill_(~inside, 0)
            # Online: the sum so far was relative to a largest logit that may be passed now.
            new_largest = torch.maximum(largest, logits.amax(1, keepdim=True))
            sums.mul_((largest - new_largest).exp_())
            sums.add_(logits.sub_(new_largest).exp_().sum(1, keepdim=True))
            largest = new_largest
            # Or they would still be there when the next ones are made.
            del weights, logits
        return largest, sums, target_logits

    def write_gradients(
        self, denominator: Tensor, hidden_gradient: Tensor | None, weight_gradient: Tensor | None
    ) -> None:
        """Add to the hidden states' gradient, and write the weight's, a tile at a time."""
        for first in range(0, len(self.weight), self.tile_words):
            weights, logits, inside, index = self.tile(first)
            # The gradient of the logits, in their place: the probabilities, less 1 at the target.
            probabilities = logits.sub_(denominator).exp_()
            probabilities.scatter_add_(1, index, -inside.to(self.sum_dtype))
            logit_gradient = probabilities.masked_fill_(~self.counts, 0).to(self.dtype)
            del logits, probabilities
            if weight_gradient is not None:
                rows = slice(first, first + len(weights))
                weight_gradient[rows] = logit_gradient.T @ self.inputs
            if hidden_gradient is not None:
                slices = zip(
                    hidden_gradient.split(TOKENS_AT_ONCE),
                    logit_gradient.split(TOKENS_AT_ONCE),
                    strict=True,
                )
                for hidden_rows, logit_rows in slices:
                    hidden_rows += logit_rows @ weights
                # A view, which would keep the tile's gradient.
                del logit_rows, slices
            del weights, logit_gradient


# --- The tied embedding ---------------------------------------------------------------------------


def apply_tied_embedding(
    model: nn.Module, embedding: nn.Embedding | None = None, head: nn.Linear | None = None
) -> "Handle":
    """Let the gradient of a weight that is embedding and output layer be made once.

    The embedding hands its weight on to the output layer, so that the output layer's gradient comes
    to the embedding's backward, which adds its rows into it. Rows of one word are summed up in FP32
    first. The weight may lie on the host while the tokens are on a GPU.

    Args:
        model: A model whose embedding and output layer share their weight,
            `(vocabulary, hidden)`.
        embedding: By default what `model.get_input_embeddings()` returns (as all language models of
            Hugging Face have it), else `model.token_embedding`.
        head: By default what `model.get_output_embeddings()` returns, else `model.head`.

    Returns:
        A handle: `names` of the two layers, and `remove()`, which undoes it.

    Raises:
        TypeError: `model` is no module, its layers are others than `nn.Embedding` and `nn.Linear`,
            or the embedding has options that change its weight or gradient.
        ValueError: Layers that share no weight, or an embedding whose forward is replaced already.
    """
    embedding, head = _tied_layers(model, embedding, head)
    names = {module: name for name, module in model.named_modules()}
    handed_on = _HandedOn()
    name = names.get(embedding, "embedding")
    handle = Handle()
    with handle.all_or_nothing():
        handle.wrap_forward(name, embedding, _run_lookup, handed_on, for_backward=True)

        # Hooks, for they are called around whatever forward the output layer has or gets.
        take = functools.partial(_take, handed_on)
        handle.names.append(names.get(head, "head"))
        handle.on_remove(head.register_forward_pre_hook(take).remove)
        handle.on_remove(head.register_forward_hook(_leave, always_call=True).remove)
        # What a KeyboardInterrupt has left there, for which PyTorch calls no hook.
        handle.on_remove(functools.partial(_tidy_up, weakref.ref(head)))
    return handle


class _HandedOn:
    """What the embedding hands on to the output layer: its weight, until that layer takes it."""

    weight: Tensor | None = None

    def __reduce__(self):  # a copy of the model has handed on nothing yet
        return type(self), ()


def _run_lookup(embedding, forward, handed_on, /, input: Tensor) -> Tensor:
    rows, weight = _TiedLookup.apply(
        embedding.weight, input, embedding.padding_idx, weakref.ref(handed_on)
    )
    handed_on.weight = weight if weight.requires_grad else None
    return rows


def _take(handed_on: _HandedOn, head: nn.Linear, _) -> None:
    if handed_on.weight is not None and torch.is_grad_enabled():
        # Found before the parameter of this name.
        vars(head)["weight"] = handed_on.weight
    handed_on.weight = None


def _leave(head: nn.Linear, *_) -> None:
    vars(head).pop("weight", None)


def _tidy_up(head: weakref.ref) -> None:
    if head() is not None:
        _leave(head())


def _tied_layers(
    model: nn.Module, embedding: nn.Embedding | None, head: nn.Linear | None
) -> tuple[nn.Embedding, nn.Linear]:
    """Return the two layers, found where they were not given, and checked."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    if embedding is None:
        find = getattr(model, "get_input_embeddings", None)
        embedding = find() if find else getattr(model, "token_embedding", None)
    if head is None:
        find = getattr(model, "get_output_embeddings", None)
        head = find() if find else getattr(model, "head", None)
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
    return embedding, head


class _TiedLookup(torch.autograd.Function):
    """The embedding's rows, and its weight again, for the output layer."""

    @staticmethod
    def forward(ctx, weight, tokens, padding_idx, handed_on):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tokens)
        ctx.padding_idx = padding_idx
        ctx.handed_on = handed_on
        ctx.weight_like = {"size": weight.shape, "dtype": weight.dtype, "device": weight.device}
        rows = nn.functional.embedding(tokens.to(weight.device), weight)
        return rows.to(tokens.device), weight.view_as(weight)

    @staticmethod
    def backward(ctx, row_gradient, weight_gradient):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A tied embedding has no second derivative: no create_graph=True, or remove() it."
            )
        if (handed_on := ctx.handed_on()) is not None:
            # What nobody has taken leads into a graph that is used up.
            handed_on.weight = None
        if weight_gradient is None:
            weight_gradient = torch.zeros(**ctx.weight_like)
        if row_gradient is not None:
            (tokens,) = ctx.saved_tensors
            row_gradient = row_gradient.reshape(-1, weight_gradient.shape[1])
            tokens = tokens.flatten()
            if ctx.padding_idx is not None:
                row_gradient = row_gradient * (tokens != ctx.padding_idx).unsqueeze(1)
            _add_rows(weight_gradient, tokens, row_gradient)
        return weight_gradient, None, None, None


def _add_rows(weight_gradient: Tensor, tokens: Tensor, row_gradient: Tensor) -> None:
    """Add the gradient of each token's row, `(tokens, hidden)`, to its word's, in place."""
    device = weight_gradient.device
    dtype = weight_gradient.dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    words, position = tokens.unique(return_inverse=True)
    words = words.to(device)
    columns = zip(
        weight_gradient.split(COLUMNS_AT_ONCE, 1),
        row_gradient.split(COLUMNS_AT_ONCE, 1),
        strict=True,
    )
    for weight_columns, row_columns in columns:
        shape = (len(words), row_columns.shape[1])
        sums = torch.zeros(shape, dtype=sum_dtype, device=row_columns.device)
        sums.index_add_(0, position, row_columns.to(sum_dtype))
        weight_columns[words] += sums.to(device, dtype)  # each word once


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
