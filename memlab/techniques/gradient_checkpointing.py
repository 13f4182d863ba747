"""Gradient checkpointing: keep what goes into a block, drop what it computes, compute it again in
backward.

What is saved between forward and backward falls to the inputs of the blocks, plus one block that is
whole again while backward passes through it. The price is a second forward pass: up to a third more
operations.

Sources: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), arXiv:1604.06174. The
work is done by PyTorch, https://docs.pytorch.org/docs/stable/checkpoint.html, in its form without
reentrant autograd; `apply_gradient_checkpointing` puts it around a model's blocks from outside.
"""

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

#: For `save=`: matrix products and fused attention, which cost most operations for each byte kept.
MATRIX_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
)


def apply_gradient_checkpointing(
    model: nn.Module,
    blocks: type | Iterable[nn.Module] | None = None,
    *,
    every: int = 1,
    save: Iterable | None = None,
    preserve_rng_state: bool = True,
) -> "Handle":
    """Checkpoint the repeated blocks of a model: backward computes again what is inside them.

    The gradients are those of the plain model, bit for bit, if a block does the same both times.
    Its second call gets the inputs, the autocast state and the random state of the first. What else
    it uses must stay: weights, train() or eval(), a cache (Hugging Face: pass use_cache=False).
    Batch norm counts twice. Under `torch.no_grad()` nothing is kept, and nothing computed again.

    To checkpoint several blocks as one, put them into an `nn.Sequential` first: fewer inputs to
    keep, more to hold at once in backward.

    Args:
        model: A model with repeated blocks. The first argument of a block is `(batch, ...)`.
        blocks: The modules to checkpoint, or their class. None takes all lists (ModuleList,
            ModuleDict, Sequential) of modules of one class, leaving out lists inside such modules:
            those of encoder and decoder, or of all stages.
        every: Checkpoint the first block and one in so many after it; the others stay as they are.
        save: Operators whose outputs are kept too, such as `MATRIX_PRODUCTS` or
            `[torch.ops.aten.mm.default]`. Attention that has dropout is computed again all the
            same. Such a block allows one backward pass, and no change of a kept output in place.
        preserve_rng_state: False spares a copy of the random state for each block, 5,056 bytes on
            the CPU. The gradients are then wrong if a block draws random numbers, as dropout does.

    Returns:
        A handle: `names` are the checkpointed blocks, `left` the other modules that have
        parameters, which keep what they kept, `remove()` undoes it.

    Raises:
        ValueError: No such blocks, blocks that are checkpointed already, `every` out of range, or
            an operator in `save` that draws random numbers.
        TypeError: `model` is no module, or `save` has something that is no operator.
    """
    blocks = _find_blocks(model, blocks)
    if any(_is_applied(block, _checkpointed) for block in blocks.values()):
        raise ValueError(
            "Gradient checkpointing is applied to these blocks already: remove() it first."
        )
    if type(every) is not int or not 1 <= every <= len(blocks):
        raise ValueError(f"every must be an int from 1 to {len(blocks)}, but it is {every!r}.")
    saved_names = None if save is None else _operator_names(save)
    checkpointed = dict(list(blocks.items())[::every])
    handle = Handle()
    handle.left = _left(model, list(checkpointed.values()))
    options = (saved_names, preserve_rng_state)
    with handle.all_or_nothing():
        for name, block in checkpointed.items():
            handle.wrap_forward(name, block, _checkpointed, *options, for_backward=True)
    return handle


def _checkpointed(
    module: nn.Module,
    forward: Callable,
    saved_names: frozenset[str] | None,
    preserve_rng_state: bool,
    /,
    *args,
    **kwargs,
):
    count = len(args)
    keywords = list(kwargs)

    def run(*values):
        return forward(*values[:count], **dict(zip(keywords, values[count:], strict=True)))

    options = {}
    if saved_names is not None:
        policy = functools.partial(_policy, saved_names)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    # By position, for only those does PyTorch save: hooks see them, and a change in place is
    # noticed.
    return checkpoint(
        run,
        *args,
        *kwargs.values(),
        use_reentrant=False,
        preserve_rng_state=preserve_rng_state,
        **options,
    )


def _policy(saved_names: frozenset[str], context, operator, *args, **kwargs) -> CheckpointPolicy:
    """Say of each operator that a block calls whether its output is kept."""
    # An operator that is not computed again draws nothing, and the next one would draw its numbers.
    draws = torch.Tag.nondeterministic_seeded in operator.tags
    dropout = any(isinstance(argument, float) and argument > 0 for argument in args)
    if operator.name() in saved_names and not (draws and dropout):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _operator_names(save: Iterable) -> frozenset[str]:
    """Return the operators by name: unlike them, a name can be pickled with the model."""
    operators = list(save) if isinstance(save, Iterable) else [save]
    for operator in operators:
        if not isinstance(operator, type(torch.ops.aten.mm.default)):
            raise TypeError(
                f"save must be operators, as torch.ops.aten.mm.default, but has {operator!r:.80}."
            )
        draws = torch.Tag.nondeterministic_seeded in operator.tags
        if draws and "attention" not in operator.name():
            raise ValueError(
                f"{operator.name()} draws random numbers, and must do so again in backward: leave"
                " it out of save."
            )
    return frozenset(operator.name() for operator in operators)


def _left(model: nn.Module, checkpointed: list[nn.Module], prefix: str = "") -> list[str]:
    """The outermost modules that have parameters, and hold and are in no checkpointed block."""
    left = []
    for name, child in model.named_children():
        if child in checkpointed:
            continue
        if not set(checkpointed).isdisjoint(child.modules()):
            left += _left(child, checkpointed, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            left.append(prefix + name)
    return left


# --- pasted from _blocks.py: begin ----------------------------------------------------------------


def _find_blocks(model: nn.Module, blocks=None) -> dict[str, nn.Module]:
    """Return the repeated blocks of a model by their names.

    None takes all lists of blocks. Those of an encoder and a decoder are two, those of a ResNet or
    a U-Net one for each stage.

    Args:
        model: The model.
        blocks: Modules of the model, or their class. None takes all lists (ModuleList, ModuleDict,
            Sequential) of modules of one class that are not inside such a module. A list of one
            module counts if another list has more of its class.

    Raises:
        TypeError: `model` is no module.
        ValueError: There are no such blocks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    names = {module: name for name, module in model.named_modules()}
    if blocks is None:
        blocks = _repeated(list(names))
    elif isinstance(blocks, type):
        blocks = [module for module in names if isinstance(module, blocks)]
    elif not hasattr(blocks, "__iter__"):
        blocks = []
    blocks = list(dict.fromkeys(blocks))
    if not blocks or any(block not in names for block in blocks):
        raise ValueError(
            f"No blocks found in {type(model).__name__}: pass blocks=, a list of its modules or"
            " their class."
        )
    return {names[block]: block for block in blocks}


def _repeated(modules: list[nn.Module]) -> list[nn.Module]:
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    lists = {
        module: list(module.children()) for module in modules if isinstance(module, containers)
    }
    lists = {
        container: blocks
        for container, blocks in lists.items()
        if len({type(block) for block in blocks}) == 1
    }
    # What is inside of a block, as its experts, is a part of it.
    inside = {inner for blocks in lists.values() for block in blocks for inner in block.modules()}
    outer = [blocks for container, blocks in lists.items() if container not in inside]

    # A list of PyTorch's own layers, as of output layers, counts only where there is no other.
    of_blocks = [blocks for blocks in outer if not _is_layer(blocks[0])]
    outer = of_blocks or sorted(outer, key=len)[-1:]

    repeated = {type(blocks[0]) for blocks in outer if len(blocks) > 1}
    repeated = repeated or {type(blocks[0]) for blocks in outer}
    return [block for blocks in outer if type(blocks[0]) in repeated for block in blocks]


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.") and not any(module.children())


# --- pasted from _blocks.py: end ------------------------------------------------------------------

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
