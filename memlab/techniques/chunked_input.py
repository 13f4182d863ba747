"""Chunked input: run a long text through a model piece by piece, with the result of the whole.

A causal language model may read a text in chunks if each sees the keys and values of those before
it: `KVCache` keeps them, and `forward_in_chunks` does the rest. What a token computes alone, in a
feed-forward layer or the loss, needs no cache: `in_chunks`. At inference both take temporaries
away. In training they save little unless each chunk is computed again in backward, since autograd
keeps what it saved.

Sources: Agrawal et al., "SARATHI" (2023), arXiv:2308.16369, for prefill in chunks; Kitaev et al.,
"Reformer" (2020), arXiv:2001.04451, section 3, for chunked feed-forward layers and losses; Beltagy
et al., "Longformer" (2020), arXiv:2004.05150, for windows; Sheng et al., "FlexGen" (2023),
arXiv:2303.06865, for a compressed cache.
"""

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# --- What attention needs of the chunks before ----------------------------------------------------


class KVCache:
    """The keys and values of the tokens that a model has read, for each of its attentions.

    Args:
        capacity: Room for so many tokens, allocated at the first chunk and written in place: under
            `torch.no_grad()` only. None keeps the chunks' own tensors and joins them at each use,
            which autograd can follow.
        window: A token sees itself and the `window - 1` before it. The cache then needs room for
            `window - 1` tokens and a chunk, however long the text. Outputs differ from those of
            full attention.
        dtype: What the numbers are kept in. None: what the model computes in. torch.int8: eight
            bits, and for each token and head one FP32 scale, the largest magnitude / 127. A smaller
            dtype rounds.

    Attributes:
        length: The number of tokens read.
        nbytes: The bytes that the cache holds, full or not.

    Raises:
        ValueError: A capacity or window below 1, another dtype, or a window or dtype without a
            capacity.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        window: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        for name, size in (("capacity", capacity), ("window", window)):
            if size is not None:
                _check_count(name, size)
        if dtype not in (None, torch.int8) and not dtype.is_floating_point:
            raise ValueError(
                f"dtype must be a floating-point type or torch.int8, but it is {dtype}."
            )
        if capacity is None and (window is not None or dtype is not None):
            raise ValueError(
                "A cache with a window or a dtype of its own needs a capacity, in tokens."
            )
        self.capacity = capacity
        self.window = window
        self.dtype = dtype
        self.clear()

    def clear(self) -> None:
        """Forget the text."""
        self.length = 0
        self._filled = 0
        self._dropped = 0
        # For each attention the keys and the values: (data, scales), or the pieces.
        self._attentions: list[tuple] = []
        self._broken = False

    def copy(self) -> "KVCache":
        """Return a cache that shares what was read, and goes its own way from here on.

        Raises:
            ValueError: The cache has a capacity, so it is written in place.
        """
        if self.capacity is not None:
            raise ValueError(
                "A cache with a capacity is written in place: only KVCache() can be shared."
            )
        other = KVCache()
        vars(other).update(vars(self), _attentions=list(self._attentions))
        return other

    @property
    def nbytes(self) -> int:
        """The bytes that the cache holds, full or not."""
        tensors = [tensor for pair in self._attentions for side in pair for tensor in side]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _begin(self, count: int) -> None:
        if self._broken:
            raise RuntimeError(
                "The model failed within an earlier chunk: clear() the cache, and begin anew."
            )
        self._dropped = 0
        if self.capacity is not None and self._filled + count > self.capacity:
            kept = self._filled if self.window is None else min(self._filled, self.window - 1)
            if kept + count > self.capacity:
                raise ValueError(
                    f"The cache has room for {self.capacity} tokens, but {kept} have to stay and"
                    f" {count} come in: raise capacity, take smaller chunks, or clear() it for a"
                    " new text."
                )
            self._dropped = self._filled - kept  # no query will see these any more

    def _extend(self, number: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Take up a chunk's keys and values, (batch, heads, chunk, width), of one attention; return
        all.
        """
        known = self._attentions[number : number + 1]
        if self.length and not known:
            raise ValueError(
                f"The model attends more often than in its first chunk, {number} times."
            )
        if self.capacity is None:
            # Cloned: they may be views into one tensor with the queries, which would stay with
            # them.
            pieces = zip(known[0] if known else ((), ()), new, strict=True)
            pair = tuple((*before, tensor.clone()) for before, tensor in pieces)
            self._attentions[number : number + 1] = [pair]
            return tuple(torch.cat(side, 2) if len(side) > 1 else side[0] for side in pair)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in new):
            raise RuntimeError(
                "Autograd cannot follow a cache with a capacity: use no_grad(), or KVCache()."
            )
        if not known:
            self._attentions.append(tuple(map(self._buffer_for, new)))
        return tuple(map(self._append, self._attentions[number], new))

    def _buffer_for(self, new: Tensor) -> tuple[Tensor, Tensor | None]:
        """Room for keys or values, (batch, heads, capacity, width), and for their scales."""
        batch, heads, _, width = new.shape
        data = new.new_empty((batch, heads, self.capacity, width), dtype=self.dtype)
        if self.dtype is not torch.int8:
            return data, None
        return data, data.new_empty((batch, heads, self.capacity, 1), dtype=torch.float32)

    def _append(self, buffer: tuple[Tensor, Tensor | None], new: Tensor) -> Tensor:
        data, scales = buffer
        if new.shape[:2] + new.shape[3:] != data.shape[:2] + data.shape[3:]:
            shapes = f"{tuple(data.shape)}, (batch, heads, capacity, width), not {tuple(new.shape)}"
            raise ValueError(f"The cache was made for {shapes}: clear() it for another batch.")
        start = self._filled - self._dropped
        if self._dropped:
            for tensor in (data,) if scales is None else buffer:
                # Cloned, since the two places may overlap.
                tensor[:, :, :start] = tensor[:, :, self._dropped : self._filled].clone()
        end = start + new.shape[2]
        if scales is None:
            data[:, :, start:end] = new
            # A view, where the cache keeps the model's own numbers.
            return data[:, :, :end].to(new.dtype)
        scale = new.abs().amax(-1, keepdim=True).float().div_(127).clamp_(min=1e-30)
        scales[:, :, start:end] = scale
        data[:, :, start:end] = (new / scale).round_()
        return data[:, :, :end].to(new.dtype).mul_(scales[:, :, :end])


class _Attention(TorchFunctionMode):
    """Gives each `scaled_dot_product_attention` the keys and values of the chunks before."""

    def __init__(self, cache: KVCache, count: int):
        super().__init__()
        self.cache = cache
        self.count = count
        self.calls = 0
        self.mask: Tensor | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            function = self.attend
        return function(*args, **(kwargs or {}))

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        causal = is_causal or query.shape[-2] == 1  # one query that sees all keys
        if attn_mask is not None or not causal:
            raise ValueError(
                "Only causal attention without a mask can go chunk by chunk. Let the model keep no"
                " keys and values itself (use_cache=False), and pad nothing."
            )
        if query.ndim != 4 or not query.shape[2] == key.shape[2] == value.shape[2] == self.count:
            raise ValueError(
                f"Queries and keys must be of the chunk's {self.count} tokens: {query.shape}."
            )
        key, value = self.cache._extend(self.calls, key, value)
        self.calls += 1
        past = key.shape[2] - self.count
        window = self.cache.window
        causal = not past and (window is None or self.count <= window)
        if not causal and self.mask is None:
            self.mask = self.make_mask(query, past)
        options |= {"attn_mask": self.mask, "dropout_p": dropout_p, "is_causal": causal}
        return F.scaled_dot_product_attention(query, key, value, **options)

    def make_mask(self, query: Tensor, past: int) -> Tensor:
        """For all layers, (chunk, keys): 0 where a query (row) sees a key, else -inf."""
        window = self.cache.window
        unseen = query.new_full((self.count, past + self.count), float("-inf"))
        if window is None:
            return unseen.triu_(past + 1)
        later = unseen.triu(past + 1)
        return later.add_(unseen.tril_(past - window))


def forward_chunk(
    model: Callable,
    tokens: Tensor,
    cache: KVCache,
    *,
    positions: nn.Embedding | str | None,
    **kwargs,
):
    """Return `model(tokens, **kwargs)` for the chunk after what `cache` has read.

    The cache then has read it, too. The model must attend through
    `torch.nn.functional.scaled_dot_product_attention` with `is_causal=True`, and not be compiled.

    Args:
        model: What is called.
        tokens: (batch, chunk, ...), such as the indices of the tokens.
        cache: What was read before.
        positions: How the model learns where the chunk stands. Its `nn.Embedding` of learned
            positions, which is then asked for later ones; or the name of the argument that takes
            positions, int64 (1, chunk), such as "position_ids"; or None, for a model that uses
            none.
        kwargs: Further arguments of the model.

    Raises:
        TypeError: `positions` is something else.
        ValueError: The model attends in another way, there is no room for so many tokens, or the
            embedding is not that of the positions.
        RuntimeError: An error has left the cache incomplete, or autograd is on and the cache has a
            capacity.
    """
    _check_chunk(tokens, cache, positions)
    start = cache.length
    count = tokens.shape[1]
    learned = isinstance(positions, nn.Embedding)
    if isinstance(positions, str):
        kwargs[positions] = torch.arange(start, start + count, device=tokens.device)[None]
    cache._begin(count)
    shift = _Shift(start, count)
    hook = positions.register_forward_pre_hook(shift) if learned else None
    try:
        with _Attention(cache, count) as attention:
            output = model(tokens, **kwargs)
        if learned and not shift.ran:
            raise ValueError("The model does not use the embedding given as positions.")
        if attention.calls == 0 or attention.calls != len(cache._attentions):
            calls = f"{attention.calls} times instead of {len(cache._attentions) or 'once a layer'}"
            raise ValueError(
                f"scaled_dot_product_attention ran {calls}: is it written out, or compiled?"
            )
    except BaseException:
        cache._broken = True
        raise
    finally:
        if hook is not None:
            hook.remove()
    cache.length += count
    cache._filled += count - cache._dropped
    return output


def _check_chunk(tokens, cache: KVCache, positions) -> None:
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or not tokens.numel():
        raise ValueError(
            f"tokens must be (batch, chunk, ...) and not empty, but they are {tokens!r:.60}."
        )
    if not (positions is None or isinstance(positions, nn.Embedding | str)):
        raise TypeError(
            f"positions must be an nn.Embedding, a name or None, but it is {positions!r:.60}."
        )
    end = cache.length + tokens.shape[1]
    if isinstance(positions, nn.Embedding) and end > positions.num_embeddings:
        raise ValueError(f"There are {end} tokens, but only {positions.num_embeddings} positions.")


class _Shift:
    """A hook on the embedding of positions, which is asked for 0 to `count - 1`: `start` later."""

    def __init__(self, start: int, count: int):
        self.start = start
        self.count = count
        self.ran = False

    def __call__(self, module: nn.Embedding, args: tuple) -> tuple:
        positions = args[0]
        first = torch.arange(self.count).to(positions)
        if positions.shape[-1] != self.count or bool((positions != first).any()):
            raise ValueError(
                "positions must be the embedding of positions, but it got other numbers."
            )
        self.ran = True
        return (positions + self.start,)


def forward_in_chunks(
    model: Callable, tokens: Tensor, cache: KVCache, chunk_size: int, **options
) -> Iterator:
    """Yield the output of `forward_chunk` for each chunk: keep what you need.

    Args:
        model: What is called.
        tokens: (batch, sequence, ...).
        cache: What was read before.
        chunk_size: Tokens of a chunk.
        options: `positions`, and further arguments of the model.

    Raises:
        ValueError: `chunk_size` is below 1, or `forward_chunk` refuses a chunk.
    """
    _check_count("chunk_size", chunk_size)
    return (
        forward_chunk(model, piece, cache, **options) for piece in tokens.split(chunk_size, dim=1)
    )


def kv_cache_bytes(
    tokens: int,
    *,
    layers: int,
    heads: int,
    width: int,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Return the bytes of a `KVCache`: for each layer two of (batch, heads, tokens, width).

    Args:
        tokens: The cache's capacity.
        layers: How often the model attends.
        heads: Those of the keys and values, of which grouped-query attention has fewer than of the
            queries.
        width: Numbers of a head.
        batch_size: Texts that are read at once.
        dtype: What the numbers are kept in; torch.int8 has an FP32 scale beside them.
    """
    scale = 4 if dtype is torch.int8 else 0
    return 2 * layers * batch_size * heads * tokens * (width * dtype.itemsize + scale)


# --- What a token computes alone ------------------------------------------------------------------


def in_chunks(
    function: Callable,
    *tensors: Tensor,
    chunk_size: int,
    combine: str = "cat",
    recompute: bool = False,
) -> Tensor:
    """Call a function that treats each token apart on chunks of the tensors; join the results.

    Results that need no gradient are written into one tensor; others are there twice while they are
    joined.

    Args:
        function: Gets a chunk of each tensor.
        tensors: (tokens, ...), cut alike.
        chunk_size: Tokens of a chunk.
        combine: "cat" joins results of (tokens, ...); "sum" adds them up, as for a loss with
            reduction="sum".
        recompute: Keep only a chunk's inputs for backward; the function runs a second time there.

    Returns:
        The results of all tokens, (tokens, ...), or their sum.

    Raises:
        ValueError: The tensors have no or different lengths, an option is wrong, or a result has
            another length than its chunk.
    """
    _check_count("chunk_size", chunk_size)
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"The tensors need one number of tokens, at least 1, not {sorted(lengths)}."
        )
    if combine not in ("cat", "sum"):
        raise ValueError(f'combine must be "cat" or "sum", but it is {combine!r}.')
    results = []
    joined = None
    start = 0
    for pieces in zip(*(tensor.split(chunk_size) for tensor in tensors), strict=True):
        if recompute:
            result = checkpoint(function, *pieces, use_reentrant=False)
        else:
            result = function(*pieces)
        if combine == "sum":
            joined = result if joined is None else joined + result
        elif not result.ndim or len(result) != len(pieces[0]):
            raise ValueError(
                f"{len(pieces[0])} tokens gave a result of shape {tuple(result.shape)}."
            )
        elif result.requires_grad:
            results.append(result)
        else:
            if joined is None:
                joined = result.new_empty((*lengths, *result.shape[1:]))
            joined[start : start + len(result)] = result
            start += len(result)
        del result  # before the next one is made
    return torch.cat(results) if results else joined


def apply_chunked_feed_forward(
    model: nn.Module, name: str, chunk_size: int, *, recompute: bool = False
) -> "Handle":
    """Let the modules of one name take `chunk_size` tokens at a time.

    They must map one tensor (..., hidden) and treat each token apart. The first time that one runs,
    it is tried on two tokens: ValueError, if one of them changes the output of the other.

    Args:
        model: The model whose modules are changed.
        name: What the modules are called: "mlp" means every "blocks.0.mlp".
        chunk_size: Tokens of a chunk.
        recompute: Keep only a chunk's inputs for backward, see `in_chunks`.

    Returns:
        A handle: `names` of the modules, and `remove()`, which undoes it.

    Raises:
        TypeError: `model` is no module.
        ValueError: No module has this name, it has been applied to one already, one holds a batch
            norm, or `chunk_size` is below 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    _check_count("chunk_size", chunk_size)
    found = {
        path: module
        for path, module in model.named_modules()
        if path and f".{path}".endswith(f".{name}")
    }
    if not found:
        raise ValueError(f"No module of this {type(model).__name__} is called {name!r}.")
    for path, module in found.items():
        if _is_applied(module, _run_in_chunks):
            raise ValueError(f"{path} takes its tokens in chunks already: remove() that first.")
        if any(isinstance(inner, nn.BatchNorm1d | nn.SyncBatchNorm) for inner in module.modules()):
            raise ValueError(f"{path} holds a batch norm, which sees all tokens at once.")
    handle = Handle()
    with handle.all_or_nothing():
        for path, module in found.items():
            options = (chunk_size, recompute, {"tried": False})
            handle.wrap_forward(path, module, _run_in_chunks, *options)
    return handle


def _run_in_chunks(module, forward, chunk_size, recompute, memory, /, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not memory["tried"] and len(rows) > 1:
        _refuse_mixed_tokens(module, forward, rows.detach()[:2])
        memory["tried"] = True
    output = in_chunks(forward, rows, chunk_size=chunk_size, recompute=recompute)
    return output.reshape(*x.shape[:-1], -1)


def _refuse_mixed_tokens(module: nn.Module, forward: Callable, two: Tensor) -> None:
    """Raise ValueError if of two tokens, (2, hidden), one changes the output of the other."""
    modes = [(inner, inner.training) for inner in module.modules()]
    module.eval()  # two draws of a dropout are never alike
    try:
        with torch.no_grad():
            together = forward(two)
            apart = torch.cat([forward(two[:1]), forward(two[1:])])
    finally:
        for inner, mode in modes:
            inner.training = mode
    rounding = torch.finfo(together.dtype).eps ** 0.5
    if (together - apart).abs().max() > rounding * together.abs().max():
        raise ValueError(
            f"{type(module).__name__} mixes tokens: in chunks it would give another output."
        )


def _check_count(name: str, size) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"{name} must be a whole number of tokens, at least 1, but it is {size!r}."
        )


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
