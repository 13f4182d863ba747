"""Change a model from outside, and undo it in any order: what all `apply_*` functions do.

Each technique can be lifted out as one file. So what stands between the two markers below is pasted
into every file that needs it (`python tools/paste.py` renews the pastes, and a test holds them
equal). The pastes know nothing of each other. They work together through what they leave on a
module: a `forward` whose class is called `_PatchedForward`, with a list `patches` of tuples
`(function, options, use)`, the innermost first.

    def _scaled(module, forward, factor, /, *args, **kwargs):
        return factor * forward(*args, **kwargs)

    def apply_scaling(model: nn.Module, factor: float) -> Handle:
        handle = Handle()
        with handle.all_or_nothing():
            for name, block in model.blocks.named_children():
                handle.wrap_forward(f"blocks.{name}", block, _scaled, factor)
        return handle

The `/` is there so that a model's own keyword may be called `factor`, too.
"""

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

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
