"""Sparse attention: a sliding window in pieces, so that nothing of sequence x sequence exists.

In a window a position sees itself and the `window - 1` positions before it. Given as a mask of
sequence x sequence, that saves nothing: the mask is as large as what it leaves out, and the fused
attention keeps it for backward. `sliding_window_attention` walks over the queries in pieces. Each
piece meets only the keys that it can see, through one small mask that all pieces share. For
backward it keeps query, key and value, as they were given, and computes each piece again when its
turn comes. So it keeps what full fused attention keeps, takes time in proportion to sequence x
window, and costs one more forward of itself.

`apply_attention` puts it, or any other attention, into a model from outside.
`hugging_face_attention` is the same for the attention interface of transformers.

Sources: Child et al., "Generating Long Sequences with Sparse Transformers" (2019),
arXiv:1904.10509; Beltagy et al., "Longformer" (2020), arXiv:2004.05150; Jiang et al., "Mistral 7B"
(2023), arXiv:2310.06825. In production, on a GPU: `torch.nn.attention.flex_attention`.
"""

import contextlib
import functools
import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: A piece has as many queries as the window, at most this many: its mask is (piece, piece +
#: window).
LARGEST_PIECE = 256

# --- The function ---------------------------------------------------------------------------------


def window_mask(
    queries: int,
    keys: int,
    window: int,
    *,
    after: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return which key each query sees: the definition of the window, and a reference.

    Args:
        queries: How many there are. They are the last positions of the keys.
        keys: How many there are.
        window: A position sees itself and `window - 1` positions before it,
        after: and so many after it.
        device: Where the mask is made.

    Returns:
        A bool tensor (queries, keys).

    Raises:
        ValueError: The window is below 1, or there are more queries than keys.
    """
    _check_sizes(queries, keys, window, after, None)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    return (key > query - window) & (key <= query + after)


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int,
    after: int = 0,
    piece: int | None = None,
) -> Tensor:
    """Return `scaled_dot_product_attention(..., attn_mask=window_mask(...))`, without that mask.

    The arguments up to `enable_gqa` are those of `scaled_dot_product_attention`, in its order, so
    that this can take its place. Backward computes each piece again; a second derivative is a
    RuntimeError.

    Args:
        query: (batch, heads, queries, head). With fewer queries than keys, they are the last
            positions: so keys from a cache can stand before them.
        key: (batch, heads, keys, head).
        value: (batch, heads, keys, value head).
        attn_mask: None; the window makes its own.
        dropout_p: 0; there is none.
        is_causal: True, or False with an `after` above 0.
        scale: What the scores are multiplied by; None takes 1 / sqrt(head).
        enable_gqa: Key and value may have fewer heads, a divisor of the query's.
        window: How many positions a position sees, itself and those before it.
        after: How many it sees after itself.
        piece: So many queries are computed at once; None takes `window`, at most 256. With pieces
            of c queries each meets c + window - 1 + after keys, so smaller ones compute less in
            vain and take more calls.

    Returns:
        (batch, heads, queries, value head).

    Raises:
        TypeError: Something is no floating-point tensor.
        ValueError: Shapes do not fit, there is a mask or dropout, or `is_causal` contradicts
            `after`.
    """
    _check_tensors(query, key, value, enable_gqa)
    _check_sizes(query.shape[2], key.shape[2], window, after, piece)
    _check_options(attn_mask, dropout_p, is_causal, after)
    if torch.is_autocast_enabled(kind := query.device.type):
        query, key, value = (
            tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value)
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    piece = min(piece or min(window, LARGEST_PIECE), query.shape[2])
    return _Window.apply(query, key, value, scale, window, after, piece)


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, window, after, piece):
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.sizes = scale, (window, after, piece)
        batch, heads, queries, _ = query.shape
        # The heads of a position side by side in memory, so that a model joins them by a view.
        output = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
        with torch.autocast(query.device.type, enabled=False):  # the types are those of the inputs
            for rows, columns, mask in _pieces(query, key, *ctx.sizes):
                output[:, :, rows] = _attend(
                    query[:, :, rows], key[:, :, columns], value[:, :, columns], mask, scale
                )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors  # once: checkpointing does not give them twice
        query_gradient = torch.empty_like(query)
        key_gradient = torch.zeros_like(key)
        value_gradient = torch.zeros_like(value)
        with torch.autocast(query.device.type, enabled=False):
            for rows, columns, mask in _pieces(query, key, *ctx.sizes):
                inputs = [
                    query[:, :, rows].detach().requires_grad_(),
                    key[:, :, columns].detach().requires_grad_(),
                    value[:, :, columns].detach().requires_grad_(),
                ]
                with torch.enable_grad():
                    output = _attend(*inputs, mask, ctx.scale)
                of_query, of_key, of_value = torch.autograd.grad(
                    output, inputs, gradient[:, :, rows]
                )
                query_gradient[:, :, rows] = of_query
                # Added up: a key is seen by the queries of more than one piece.
                key_gradient[:, :, columns] += of_key
                value_gradient[:, :, columns] += of_value
        return query_gradient, key_gradient, value_gradient, None, None, None, None


def _attend(query, key, value, mask, scale) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # fused kernels with a mask want as many heads everywhere
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _pieces(query, key, window, after, piece) -> Iterator[tuple[slice, slice, Tensor]]:
    """For each piece of the queries: its rows, the columns of the keys that it sees, their mask.

    Every mask is a part of one: seen from its first query, a piece looks like any other, but for
    the ends.
    """
    queries = query.shape[2]
    keys = key.shape[2]
    window = min(window, keys)
    after = min(after, keys)
    # From what the first query sees first to what the last sees last.
    width = window - 1 + piece + after
    row = torch.arange(piece, device=query.device)[:, None]
    column = torch.arange(width, device=query.device)
    hidden = (column < row) | (column > row + window - 1 + after)
    # Kernels on a GPU want rows that begin at multiples of 16 numbers, and copy a mask that has
    # others.
    band = query.new_zeros(piece, -(-width // 16) * 16)[:, :width]
    band.masked_fill_(hidden, float("-inf"))
    for start in range(0, queries, piece):
        count = min(piece, queries - start)
        # Negative at the beginning, where nothing is before.
        first = start + keys - queries - (window - 1)
        columns = slice(max(first, 0), min(first + window - 1 + count + after, keys))
        mask = band[:count, columns.start - first : columns.stop - first]
        yield slice(start, start + count), columns, mask.clone() if first < 0 else mask


def _check_tensors(query, key, value, enable_gqa) -> None:
    given = {"query": query, "key": key, "value": value}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else f"{tensor!r:.60}"
            raise TypeError(f"{name} must be a floating-point tensor, but it is {what}.")
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
    fits = all(tensor.ndim == 4 and tensor.numel() for tensor in given.values())
    if fits:
        heads, key_heads = query.shape[1], key.shape[1]
        fits = (
            query.shape[0] == key.shape[0]
            and query.shape[3] == key.shape[3]
            and key.shape[:3] == value.shape[:3]
            and (heads % key_heads == 0 if enable_gqa else heads == key_heads)
        )
    if not fits:
        raise ValueError(
            "The shapes must be query (batch, heads, queries, head), key (batch, heads, keys,"
            " head) and value (batch, heads, keys, value head), with fewer heads of keys only"
            f" under enable_gqa, but they are {shapes}."
        )
    devices, types = (
        {getattr(tensor, what) for tensor in given.values()} for what in ("device", "dtype")
    )
    if len(devices) > 1 or (len(types) > 1 and not torch.is_autocast_enabled(query.device.type)):
        kinds = ", ".join(
            f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in given.items()
        )
        raise ValueError(f"All must be of one type and on one device, but they are {kinds}.")


def _check_options(attn_mask, dropout_p, is_causal, after) -> None:
    if attn_mask is not None:
        raise ValueError(
            "sliding_window_attention makes its own mask: attn_mask must be None. Cut padding off."
        )
    if dropout_p:
        raise ValueError(
            f"sliding_window_attention has no dropout: dropout_p must be 0, not {dropout_p}."
        )
    if bool(is_causal) != (after == 0):
        raise ValueError(
            f"is_causal={bool(is_causal)} and after={after} contradict each other: a causal window"
            " sees nothing after itself, and one that is not causal has to say how much."
        )


def _check_sizes(queries, keys, window, after, piece) -> None:
    for name, size, least in (("window", window, 1), ("after", after, 0), ("piece", piece, 1)):
        if name == "piece" and size is None:
            continue
        if type(size) is not int or size < least:
            raise ValueError(
                f"{name} must be a whole number of at least {least}, but it is {size!r}."
            )
    if not 1 <= queries <= keys:
        raise ValueError(
            f"The queries must be the last positions of the keys, but there are {queries} queries"
            f" and {keys} keys."
        )


# --- Applying it from outside ---------------------------------------------------------------------


def apply_attention(module: nn.Module, attention: Callable[..., Tensor]) -> "Handle":
    """Let another attention take the place of `scaled_dot_product_attention` in a module.

        for block in model.blocks:
            window = functools.partial(sliding_window_attention, window=128)
            apply_attention(block.attention, window)

    When the module runs and never calls `scaled_dot_product_attention`, it raises RuntimeError.

    Args:
        module: The one whose own forward calls `torch.nn.functional.scaled_dot_product_attention`.
            Not the whole model: a block that checkpointing runs again in backward would run without
            it.
        attention: Gets what the module gives to `scaled_dot_product_attention`, as it is. A model
            can be pickled if it is a function that has a name, or a `functools.partial` of one.

    Returns:
        A handle: `names`, here the module's class, and `remove()`, which undoes it.

    Raises:
        TypeError: `module` is no module or `attention` no function.
        ValueError: The module has another attention already.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, but it is {module!r:.80}.")
    if not callable(attention):
        raise TypeError(f"attention must be a function, but it is {attention!r:.80}.")
    if _is_applied(module, _run_with_attention):
        raise ValueError(
            f"This {type(module).__name__} has another attention already: remove() that first."
        )
    handle = Handle()
    handle.wrap_forward(type(module).__name__, module, _run_with_attention, attention)
    return handle


def _run_with_attention(module, forward, attention, /, *args, **kwargs):
    with _Replaced(attention) as replaced:
        output = forward(*args, **kwargs)
    if not replaced.calls:
        raise RuntimeError(
            f"{type(module).__name__} did not call scaled_dot_product_attention, so no attention"
            " was replaced in it. Does it compute its scores by hand (in our models:"
            ' attention="naive")?'
        )
    return output


class _Replaced(TorchFunctionMode):
    """Within it, in this thread, `attention` is called for `scaled_dot_product_attention`."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.calls += 1
            function = self.attention
        return function(*args, **(kwargs or {}))


def hugging_face_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:
    """`sliding_window_attention` for transformers: it makes no sequence x sequence mask.

        from transformers.masking_utils import flash_attention_mask

        transformers.AttentionInterface.register("window", hugging_face_attention)
        transformers.AttentionMaskInterface.register("window", flash_attention_mask)
        model.set_attn_implementation("window")

    Without the mask's line padding would be attended to; with it, padding is refused. See
    https://huggingface.co/docs/transformers/attention_interface.

    Args:
        module: The attention layer.
        query: (batch, heads, queries, head).
        key: (batch, key heads, keys, head), with as many heads or fewer.
        value: As `key`.
        attention_mask: None.
        scaling: What the scores are multiplied by; None takes 1 / sqrt(head).
        dropout: 0; there is none.
        sliding_window: The layer's window; None attends to all that comes before.
        is_causal: True, or None for what the module says.
        position_ids: Consecutive, or None.
        others: What else transformers gives; much of it changes nothing here.

    Returns:
        The output, (batch, queries, heads, head), and None, for there are no weights to show.

    Raises:
        ValueError: A padded or packed batch, a static cache, dropout, a module that is not causal,
            or a model that does more with its scores, as soft-capping them.
    """
    if position_ids is not None:
        _check_positions(position_ids, keys=key.shape[2])
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"hugging_face_attention is causal, and {type(module).__name__} is not.")
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if others.get(name) is not None:
            raise ValueError(
                f"hugging_face_attention has no {name}, and {type(module).__name__} needs it."
            )
    options = {"scale": scaling, "enable_gqa": True, "window": sliding_window or key.shape[2]}
    output = sliding_window_attention(query, key, value, attention_mask, dropout, **options)
    return output.transpose(1, 2), None


def _check_positions(position_ids: Tensor, keys: int) -> None:
    if bool((position_ids.diff() != 1).any()):
        raise ValueError(
            "hugging_face_attention knows no packed sequences: position_ids must be consecutive."
        )
    if bool((position_ids[..., -1] + 1 < keys).any()):
        raise ValueError(
            f"There are {keys} keys for fewer positions. A static cache, which has"
            " places for later positions, does not work with hugging_face_attention: use the"
            " dynamic one."
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
