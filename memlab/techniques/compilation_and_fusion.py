"""Fused linear and cross-entropy: the loss of a large vocabulary without its logits.

A language model's last layer turns every token into one number a word, and the plain loss holds
three such tensors at once: the log-softmax, its gradient and the logits' gradient.
`linear_cross_entropy` walks over the tokens in chunks, and takes each chunk's gradient at once, in
forward, while its logits are there. So only one chunk of logits exists at a time. What is kept for
backward is the gradient of the weight and that of the hidden states. The matrix products are the
same, and as many. `apply_fused_loss` puts it into a model.

Sources: Hsu et al., "Liger Kernel" (2024), arXiv:2410.10989, which takes the gradient in forward,
chunk by chunk; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024),
arXiv:2411.09009, which goes further, in one kernel. `torch.nn.functional.linear_cross_entropy` is
PyTorch's own, from 2.13 on.
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

# --- The function ---------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return `cross_entropy(linear(hidden, weight, bias), targets)` without the logits of all
    tokens.

    The softmax and the sum of the weight's gradient are FP32 at least; the matrix products run in
    autocast's type, or that of the inputs. What needs no gradient gets none, and under
    `torch.no_grad()` nothing is kept. The first backward pass uses the gradients up: a second one
    is a RuntimeError, and so is `create_graph=True`.

    Args:
        hidden: The output layer's input, `(tokens, hidden)`.
        weight: The output layer's weight, `(vocabulary, hidden)`.
        targets: The words that are to be predicted, int64 `(tokens,)`.
        bias: `(vocabulary,)`, or None.
        ignore_index: Tokens with this target count for nothing, in the mean neither.
        reduction: "mean" over the tokens that count (NaN if none does, as in `cross_entropy`), or
            "sum".
        chunk_tokens: So many tokens have logits at once; None takes as many as the hidden size, so
            that a chunk's logits are as large as the weight. Fewer need less memory and more passes
            over the weight.

    Returns:
        The loss, a scalar, FP32 at least.

    Raises:
        TypeError, ValueError: Other types, shapes, devices or options. A target that is no word is
            a ValueError on the CPU; on a GPU, where looking would stop the queue, CUDA's own
            assertion.
    """
    _check(hidden, weight, targets, bias, ignore_index, reduction, chunk_tokens)
    dtype = hidden.dtype
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    chunk_tokens = chunk_tokens or hidden.shape[1]
    options = (ignore_index, reduction, chunk_tokens, dtype, torch.is_grad_enabled())
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, *options)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, ignore_index, reduction, chunk_tokens, dtype, learns
    ):
        sum_dtype = torch.promote_types(dtype, torch.float32)
        hidden_gradient = weight_gradient = bias_gradient = None
        if learns and ctx.needs_input_grad[0]:
            hidden_gradient = torch.zeros_like(hidden)
        if learns and ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros_like(weight, dtype=sum_dtype)
        if learns and ctx.needs_input_grad[2]:
            bias_gradient = torch.zeros_like(bias, dtype=sum_dtype)
        gradients = [hidden_gradient, weight_gradient, bias_gradient]
        nothing_learns = all(gradient is None for gradient in gradients)
        count = (targets != ignore_index).sum() if reduction == "mean" else targets.new_ones(())
        loss = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        # The types are chosen here: no autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(hidden), chunk_tokens):
                logits = None  # those of the last chunk go first
                rows = slice(start, start + chunk_tokens)
                inputs = hidden[rows].to(dtype)
                ignored = (targets[rows] == ignore_index).unsqueeze(1)
                words = targets[rows].unsqueeze(1).masked_fill(ignored, 0)
                logits = F.linear(inputs, matrix, None if bias is None else bias.to(dtype))
                logits = logits.to(sum_dtype)

                # The softmax, in the place of the logits: nothing else of their size is made.
                logits.sub_(logits.amax(1, keepdim=True))
                of_words = logits.gather(1, words)
                totals = logits.exp_().sum(1, keepdim=True)
                loss += (totals.log() - of_words).masked_fill_(ignored, 0).sum()
                if nothing_learns:
                    continue

                # Their gradient, in the same place: the probabilities, less one at the target.
                logits.div_(totals).scatter_add_(1, words, torch.full_like(of_words, -1))
                logits.masked_fill_(ignored, 0)
                if bias_gradient is not None:
                    bias_gradient += logits.sum(0)
                logits = logits.to(dtype)
                if hidden_gradient is not None:
                    hidden_gradient[rows] = logits @ matrix
                if weight_gradient is not None:
                    _add_product(weight_gradient, logits.T, inputs)

        # Divided by the count in backward, with the gradient that comes in there: FP16 could not
        # hold p / count.
        ctx.gradients = gradients
        ctx.scale = 1 / count.clamp(min=1).to(sum_dtype)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return loss / count

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy has no second derivative: do not pass create_graph=True."
            )
        # Changed in place and given away: autograd makes the same tensor `weight.grad`, without a
        # copy.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_cross_entropy gave its gradients away in the first backward pass. Compute"
                " the loss again, or add up losses and call backward once."
            )
        factor = gradient * ctx.scale
        scaled = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, *[None] * 6


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. A 16-bit product cannot be added to it in one go: it is made in pieces as
    large as `a`.
    """
    if a.dtype == total.dtype:
        # `addmm_` does the same, but no FlopCounterMode counts it.
        torch.addmm(total, a, b, out=total)
    else:
        size = max(1, a.numel() // b.shape[1])
        for total_rows, rows in zip(total.split(size), a.split(size), strict=True):
            total_rows += rows @ b


def _check(hidden, weight, targets, bias, ignore_index, reduction, chunk_tokens) -> None:
    tensors = {"hidden": hidden, "weight": weight, "targets": targets}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, but it is {tensor!r:.60}.")
        if name != "targets" and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, but it is {tensor.dtype}.")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64 indices, but they are {targets.dtype}.")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tokens, vocabulary, width = targets.shape[:1], weight.shape[:1], weight.shape[1:2]
    fitting = [tokens + width, vocabulary + width, tokens, vocabulary]
    if list(shapes.values()) != fitting[: len(shapes)] or weight.ndim != 2:
        raise ValueError(
            "The shapes must be hidden (tokens, hidden), weight (vocabulary, hidden), targets"
            " (tokens,), bias (vocabulary,), but they are"
            f" {', '.join(f'{name} {shape}' for name, shape in shapes.items())}."
        )
    devices = {str(tensor.device) for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(
            f"All must be on one device, but they are on {' and '.join(sorted(devices))}."
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: convert one, or use autocast."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", but it is {reduction!r}.')
    _check_chunk(chunk_tokens)
    if targets.device.type == "cpu":
        outside = (targets < 0) | (targets >= len(weight))
        wrong = targets[outside & (targets != ignore_index)]
        if len(wrong):
            rule = f"0 to {len(weight) - 1}, or {ignore_index} to be ignored"
            raise ValueError(f"Targets must be {rule}, but one is {wrong[0].item()}.")


def _check_chunk(tokens) -> None:
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise ValueError(f"chunk_tokens must be a positive int or None, but it is {tokens!r}.")


# --- Applying it from outside ---------------------------------------------------------------------


def apply_fused_loss(
    model: nn.Module,
    head: nn.Linear | None = None,
    *,
    chunk_tokens: int | None = None,
    loss: Callable = linear_cross_entropy,
) -> "Handle":
    """Let a model's output layer return `UncomputedLogits` in training.

    The model's own code goes on as it is: when it gives them to
    `torch.nn.functional.cross_entropy`, they go through `linear_cross_entropy`. When it does
    anything else with them, as soft-capping or scaling them, that is a TypeError. Under
    `torch.no_grad()` or in `eval()` the layer returns logits as before. A trainer that goes round
    the output layer, and computes the logits from its weight itself, changes nothing: the handle's
    `never_used` names the layer then, and `remove()` warns.

    Args:
        model: The model whose output layer is changed.
        head: The output layer, an `nn.Linear`; None takes what `model.get_output_embeddings()`
            returns (as all language models of Hugging Face have it), else `model.head` or
            `model.lm_head`.
        chunk_tokens: As for `linear_cross_entropy`.
        loss: Another function to take its place, called as it is but for `chunk_tokens`.

    Returns:
        A handle: `names`, of the output layer, and `remove()`, which undoes it.

    Raises:
        TypeError: `model` is no module, the head is no plain `nn.Linear`, or the loss no function.
        ValueError: The head is not found or has it already, or another loss is given
            `chunk_tokens`.
    """
    name, head = _output_layer(model, head)
    _check_chunk(chunk_tokens)
    if not callable(loss):
        raise TypeError(
            f"loss must be a function like linear_cross_entropy, but it is {loss!r:.80}."
        )
    if loss is linear_cross_entropy:
        loss = functools.partial(loss, chunk_tokens=chunk_tokens)
    elif chunk_tokens is not None:
        raise ValueError(
            "chunk_tokens is linear_cross_entropy's: give another loss its sizes with"
            " functools.partial."
        )
    handle = Handle()
    handle.wrap_forward(name, head, _run_uncomputed, loss, innermost=True, for_backward=True)
    return handle


def _output_layer(model: nn.Module, head: nn.Linear | None) -> tuple[str, nn.Linear]:
    """The output layer and its name in the model: found where it was not given, and checked."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    if head is None:
        find = getattr(model, "get_output_embeddings", lambda: None)
        head = find() or getattr(model, "head", None) or getattr(model, "lm_head", None)
        if head is None:
            raise ValueError(
                f"No output layer found in {type(model).__name__}: pass head=, its nn.Linear."
            )
    if type(head) is not nn.Linear:
        raise TypeError(
            f"The output layer must be a plain nn.Linear, but it is {type(head).__name__}."
        )
    names = {module: name for name, module in model.named_modules()}
    if head not in names:
        raise ValueError(f"The head given is no part of this {type(model).__name__}.")
    if _is_applied(head, _run_uncomputed):
        raise ValueError(
            f"The loss of this {type(model).__name__} is fused already: remove() it first."
        )
    return names[head], head


def _run_uncomputed(head, forward, loss, /, input: Tensor) -> "Tensor | UncomputedLogits":
    if not (head.training and torch.is_grad_enabled()):
        return forward(input)
    device = input.device.type
    autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    return UncomputedLogits(input, head.weight, head.bias, loss, autocast)


class UncomputedLogits:
    """The place of the logits (..., vocabulary): what they would be computed from.

    It can be flattened, viewed, sliced along its first axes and given to `cross_entropy`, with
    class indices as targets, without `weight` or label smoothing. `compute()` returns the logits;
    all else is a TypeError.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: Callable, autocast: tuple
    ):
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.loss = loss
        # As it was where the logits would have been computed.
        self.autocast = autocast

    shape = property(lambda self: torch.Size((*self.hidden.shape[:-1], len(self.weight))))
    device = property(lambda self: self.hidden.device)
    # The softmax is FP32 anyway.
    float = contiguous = lambda self: self

    def size(self, axis: int | None = None):
        return self.shape if axis is None else self.shape[axis]

    def view(self, *shape) -> "UncomputedLogits":
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if len(shape) < 2 or shape[-1] != len(self.weight):
            raise _refusal(f"view{tuple(shape)}")
        return self._with(self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> "UncomputedLogits":
        if end_dim % self.hidden.ndim == self.hidden.ndim - 1:
            raise _refusal(f"flatten({start_dim}, {end_dim})")
        return self._with(self.hidden.flatten(start_dim, end_dim))

    def __getitem__(self, index) -> "UncomputedLogits":
        index = index if isinstance(index, tuple) else (index,)
        along_words = len(index) >= self.hidden.ndim or any(axis is ... for axis in index)
        if along_words and not (isinstance(index[-1], slice) and index[-1] == slice(None)):
            raise _refusal(f"the index {index}")
        return self._with(self.hidden[index])

    def compute(self) -> Tensor:
        """Return the logits (..., vocabulary)."""
        with torch.autocast(*self.autocast):
            return F.linear(self.hidden, self.weight, self.bias)

    def _with(self, hidden: Tensor) -> "UncomputedLogits":
        return UncomputedLogits(hidden, self.weight, self.bias, self.loss, self.autocast)

    def _cross_entropy(
        self,
        target,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
    ):
        if any(option is not None for option in (weight, size_average, reduce)) or label_smoothing:
            raise _refusal("cross_entropy with weight=, label_smoothing=, size_average= or reduce=")
        options = {"ignore_index": ignore_index, "reduction": reduction}
        with torch.autocast(*self.autocast):
            return self.loss(self.hidden, self.weight, target, self.bias, **options)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        logits, *others = args or (kwargs.pop("input", None),)
        if function is not F.cross_entropy or not isinstance(logits, cls):
            raise _refusal(getattr(function, "__name__", str(function)))
        return logits._cross_entropy(*others, **kwargs)

    def __mul__(self, other):
        raise _refusal("scaling or soft-capping them")

    __rmul__ = __truediv__ = __mul__

    def __getattr__(self, name: str):
        raise AttributeError(str(_refusal(name)))


def _refusal(what: str) -> TypeError:
    return TypeError(
        f"The loss of this model is fused, so in training its logits are not computed, and {what}"
        " needs them. Call compute() on them, use eval() or no_grad(), or remove() the fused loss."
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
