"""Gradient checkpointing: keep what goes into a block, drop what it computes, compute it again in
backward.

What is saved between forward and backward falls to the inputs of the blocks, plus one block that is
whole again while backward passes through it. The price is a second forward pass: up to a third more
operations.

Sources: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), arXiv:1604.06174. The
work is done by PyTorch, https://docs.pytorch.org/docs/stable/checkpoint.html, in its form without
reentrant autograd; `apply_gradient_checkpointing` puts it around a model's blocks from outside.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable

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
        blocks: The modules to checkpoint, or their class. None takes the longest list (ModuleList,
            Sequential) of modules of one class, leaving out lists inside such modules.
        every: Checkpoint the first block and one in so many after it; the others stay as they are.
        save: Operators whose outputs are kept too, such as `MATRIX_PRODUCTS` or
            `[torch.ops.aten.mm.default]`. Attention that has dropout is computed again all the
            same. Such a block allows one backward pass, and no change of a kept output in place.
        preserve_rng_state: False spares a copy of the random state for each block, 5,056 bytes on
            the CPU. The gradients are then wrong if a block draws random numbers, as dropout does.

    Returns:
        A handle: `names` are the checkpointed blocks, `remove()` undoes it.

    Raises:
        ValueError: No such blocks, blocks that are checkpointed already, `every` out of range, or
            an operator in `save` that draws random numbers.
        TypeError: `save` has something that is no operator.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = _find_blocks(model, blocks)
    if type(every) is not int or not 1 <= every <= len(blocks):
        raise ValueError(f"every must be an int from 1 to {len(blocks)}, but it is {every!r}.")
    saved_names = None if save is None else _operator_names(save)
    handle = Handle()
    for block in blocks[::every]:
        handle.wrap_forward(names[block], block, _checkpointed, saved_names, preserve_rng_state)
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


def _find_blocks(model: nn.Module, blocks) -> list[nn.Module]:
    modules = list(model.modules())
    if blocks is None:
        lists = [module for module in modules if isinstance(module, nn.ModuleList | nn.Sequential)]
        lists = [each for each in lists if len({type(block) for block in each}) == 1]
        inner = {module for each in lists for block in each for module in block.modules()}
        blocks = max((each for each in lists if each not in inner), key=len, default=[])
    elif isinstance(blocks, type):
        blocks = [module for module in modules if isinstance(module, blocks)]
    blocks = list(dict.fromkeys(blocks))
    if not blocks or not set(modules).issuperset(blocks):
        raise ValueError(
            f"No blocks found in {type(model).__name__}: pass blocks=, a list or a class."
        )
    if any(_is_applied(block, _checkpointed) for block in blocks):
        raise ValueError(
            "Gradient checkpointing is applied to these blocks already: remove() it first."
        )
    return blocks


# --- pasted from _patch.py: begin -----------------------------------------------------------------


class Handle:
    """What a technique has changed in a model: `names` says where, `remove()` undoes it.

    As a context manager it removes at the end of the block. It holds the model weakly, and a model
    keeps what was applied to it when its handle is gone.
    """

    def __init__(self):
        self.names: list[str] = []
        # By their owners: what was replaced lives no longer than the model that it was replaced in.
        self._replaced = weakref.WeakKeyDictionary()
        self._undo = []

    def wrap_forward(
        self, name: str, module: nn.Module, function: Callable, *options, innermost: bool = False
    ) -> None:
        """Let `function(module, forward, *options, *args, **kwargs)` run as the module's forward.

        Its `forward` is what ran before, or runs further inside. A copy or a pickle of the model
        takes function and options along: a function that has a name, and plain options.

        Args:
            name: What the module is called in the model.
            innermost: Put it below all that is applied already, for a function that computes what
                the module's own forward does, and never calls it.
        """
        patched = vars(module).get("forward")
        if type(patched).__name__ != "_PatchedForward":
            patched = module.forward = _PatchedForward(module, patched)
        patch = (function, options)
        patched.patches.insert(0 if innermost else len(patched.patches), patch)
        self.names.append(name)
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
        """
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

    def __exit__(self, *exception) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(names={self.names})"


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
        for function, options in self.patches:
            forward = functools.partial(function, self.module(), forward, *options)
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
