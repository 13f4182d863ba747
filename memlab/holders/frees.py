"""The line that takes a holder away, where it is known for sure."""

from __future__ import annotations

import torch

from memlab.holders.roots import notebook
from memlab.holders.way import LISTS, Place, Way, is_of_last_error
from memlab.holders.words import place_of_thing

REMOVE_HOOK = "handle.remove()  # the handle that registering the hook returned"
# `traceback.clear_frames` leaves the copies of the variables that IPython made to show the error.
NEXT_ERROR = "1/0  # the next error takes this one's place; then, in the next cell, gc.collect()"
KEEP_NUMBER = "keep loss.item() or loss.detach() instead of the loss"
KEEP_DETACHED = "keep its .detach() instead"


def line_that_frees(way: Way, place: Place) -> str | None:
    """Return the line that takes a holder away.

    Args:
        way: from the tensor up.
        place: where the tensor hangs.

    Returns:
        A line of code; None where none is surely right.
    """
    root_frees = way.root.frees if way.root is not None else None
    if way.root is not None and way.root.kind == "notebook output":
        return KEEP_DETACHED if place.kind == "graph" and len(way.things) > 2 else root_frees
    if place.kind == "hook":
        return REMOVE_HOOK
    if place.kind == "graph":
        return root_frees if len(way.things) == 2 else _instead_of(way.things[1])
    if place.kind == "traceback":
        if is_of_last_error(way.things[1]):
            # A script that failed has no next error and no next cell.
            return NEXT_ERROR if notebook() is not None else None
        # An exception that has a name: the frames, tracebacks and other exceptions are below it.
        return root_frees if issubclass(type(way.things[-1]), BaseException) else None
    if place.kind in ("list", "dict"):
        return _clears(way)
    if place.kind == "variable":
        return root_frees
    if place.kind in ("cache", "suspended"):
        return place.code
    if place.kind == "gradient":
        code = place_of_thing(way.above()).code
        return f"{code}.grad = None" if code else None
    if place.kind == "closure":
        # The tensor, its cell, the function's tuple of cells, the function.
        return root_frees if len(way.things) == 4 else None
    if place.noun != "attribute":
        return None
    if place.code:
        return f"{place.code} = None"
    # An object in a list, say. A module is no such thing: nobody throws a layer away for it.
    return None if isinstance(way.things[1], torch.nn.Module) else _clears(way.above())


def _instead_of(owner: object) -> str | None:
    if not isinstance(owner, torch.Tensor):
        return None
    return KEEP_NUMBER if owner.numel() == 1 else KEEP_DETACHED


def _clears(way: Way) -> str | None:
    """Clear the innermost of the lists and dictionaries around a tensor that the code has a name
    for.
    """
    if any(issubclass(type(thing), torch.optim.Optimizer) for thing in way.things):
        return None  # nobody frees its state between two steps
    for steps, thing in enumerate(way.things[1:], start=1):
        if not issubclass(type(thing), (dict, *LISTS)):
            return None
        place = place_of_thing(way.above(steps))
        if place.kind == "cache":
            return place.code
        if code := place.code:
            if not issubclass(type(thing), (tuple, frozenset)):
                return f"{code}.clear()"
            if code.isidentifier():
                return f"del {code}"
    return None
