"""Targets: the tensors that lie beside what a module was given, and go to the loss only."""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
import types
from collections.abc import Iterator

import torch

# A longer list is a collection, of which one was given to a module.
_MOST_IN_A_LIST = 4


def targets_beside(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors that are held together with a module's inputs and have their first size,
    as targets have.

    Together are those of one tuple, one short list, one dictionary, one object, one closure, or the
    variables of one function (a generator that waits, or one that runs and called memlab).

    Args:
        inputs: what modules were given, `(batch, ...)`.
    """
    if not inputs:
        return []
    ids = {id(tensor) for tensor in inputs}
    found: dict[int, torch.Tensor] = {}
    for held in _held_together(inputs):
        sizes = {thing.shape[:1] for thing in held if id(thing) in ids}
        for thing in held:
            # These are strangers: half-built, lazy, fake, of any class.
            with contextlib.suppress(Exception):
                if _could_be_a_target(thing) and thing.shape[:1] in sizes:
                    found[id(thing)] = thing
    return [thing for identity, thing in found.items() if identity not in ids]


def _could_be_a_target(thing: object) -> bool:
    if not isinstance(thing, torch.Tensor):
        return False
    return thing.dim() > 0 and thing.grad_fn is None and not thing.requires_grad


def _held_together(inputs: list[torch.Tensor]) -> Iterator[list[object]]:
    """What is held in the places in which one of the inputs is."""
    cells = []
    for holder in gc.get_referrers(*inputs):
        if holder is inputs:
            continue
        if isinstance(holder, types.CellType):
            cells.append(holder)
        elif isinstance(holder, dict):
            yield list(holder.values())
        elif isinstance(holder, tuple):
            yield list(holder)
        elif isinstance(holder, list) and len(holder) <= _MOST_IN_A_LIST:
            yield holder
        elif isinstance(holder, types.GeneratorType) or _has_attributes(holder):
            yield gc.get_referents(holder)
    for closure in gc.get_referrers(*cells) if cells else ():
        if isinstance(closure, tuple):
            yield [content for cell in closure for content in gc.get_referents(cell)]
    for frame in _frames_of_the_caller():
        yield list(variables_of(frame).values())


def _has_attributes(thing: object) -> bool:
    """Whether it is an object of somebody's class, which holds its attributes by itself."""
    return hasattr(type(thing), "__dict__") and not isinstance(
        thing, (list, torch.Tensor, torch.nn.Module, types.FunctionType, types.FrameType)
    )


def _frames_of_the_caller() -> Iterator[types.FrameType]:
    """The functions that run now in this thread, memlab's own left out: the garbage collector does
    not know what these hold.
    """
    frame = sys._getframe()
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("memlab."):
            yield frame
        frame = frame.f_back


def keywords_of(module: torch.nn.Module) -> dict[str, object]:
    """The keywords that a module is called with, while a hook before its forward runs.

    A hook for all modules is not given them. They are in the function that calls it.
    """
    frame = sys._getframe(1)
    for _ in range(6):
        frame = frame and frame.f_back
        if frame is not None and "kwargs" in frame.f_code.co_varnames:
            variables = variables_of(frame)
            if variables.get("self") is module:
                return dict(variables.get("kwargs") or {})
    return {}


def variables_of(frame: types.FrameType) -> dict[str, object]:
    """Return the variables of a function that runs, and leave nothing behind that holds them.

    Up to Python 3.12, `f_locals` is a copy that stays with the frame: what the function deletes
    afterwards would live on in it.
    """
    copy = frame.f_locals
    variables = dict(copy)
    if type(copy) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        if sys.getrefcount(copy) <= 3:  # the frame's and ours; else somebody called `locals()`
            copy.clear()
    return variables
