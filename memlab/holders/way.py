"""The way from a tensor up to a name: what refers to what, and by which name it does."""

from __future__ import annotations

import collections
import contextlib
import inspect
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memlab.holders.roots import Root, variables


@dataclass(frozen=True)
class Way:
    """The way from an object up to a name.

    Attributes:
        things: the object, what refers to it, what refers to that, and so on.
        root: the name of the last one; None for a function or a class, which has one by itself.
        by_graph: the `id`s of (child, parent) where the parent holds the child by its graph.
    """

    things: Sequence[object]
    root: Root | None = None
    by_graph: frozenset[tuple[int, int]] = frozenset()

    @property
    def owner(self) -> object:
        """The first object, or None."""
        return self.things[0] if self.things else None

    def above(self, steps: int = 1) -> Way:
        """The way from further up."""
        return Way(self.things[steps:], self.root, self.by_graph)

    def above_types(self, *kinds: type) -> Way:
        """The way from the first object that is none of these."""
        steps = 0
        while steps < len(self.things) - 1 and is_a(self.things[steps], kinds):
            steps += 1
        return self.above(steps)


class Place(NamedTuple):
    """Where an object hangs.

    Attributes:
        kind: the kind of holder.
        where: the rest in words, after the name.
        noun: what its name is: "variable", "attribute".
        name: its name there; empty if it has none.
        code: an expression for the object, if the user's code has one.
    """

    kind: str
    where: str
    noun: str = ""
    name: str = ""
    code: str | None = None


LISTS = (list, tuple, set, frozenset, collections.deque)


def is_a(thing: object, *kinds: type) -> bool:
    """The class is asked and not the object: a stranger may answer anything."""
    return issubclass(type(thing), kinds)


def without_dictionaries(things: Sequence[object]) -> list[object]:
    """Leave out the dictionaries that are an object's attributes, or a copy of a function's
    variables: the object stands for them.
    """
    found = [things[0]]
    for index, thing in enumerate(things[1:], start=1):
        owner = things[index + 1] if index + 1 < len(things) else None
        if not (type(thing) is dict and owner is not None and _is_its_dictionary(thing, owner)):
            found.append(thing)
    return found


def _is_its_dictionary(values: dict, owner: object) -> bool:
    if is_a(owner, type):
        return all(vars(owner).get(name) is value for name, value in list(values.items())[:5])
    frame = stopped_frame(owner)
    if frame is not None:
        return not any(value is values for value in variables(frame).values())
    with contextlib.suppress(Exception):
        return object.__getattribute__(owner, "__dict__") is values
    return False


def stopped_frame(thing: object) -> types.FrameType | None:
    """The frame of a suspended generator or coroutine, or of a function that has ended."""
    for kind, name in _SUSPENDED.items():
        if is_a(thing, kind):
            return getattr(thing, name)
    return thing if is_a(thing, types.FrameType) else None


_SUSPENDED = {
    types.GeneratorType: "gi_frame",
    types.CoroutineType: "cr_frame",
    types.AsyncGeneratorType: "ag_frame",
}


def is_of_last_error(frame: types.FrameType) -> bool:
    """Whether Python keeps a frame for whoever wants to look at the last error that ended a cell or
    a line at the prompt.
    """
    step = getattr(sys, "last_traceback", None)
    while step is not None:
        if step.tb_frame is frame:
            return True
        step = step.tb_next
    return False


def name_in(values: dict, thing: object) -> str:
    return next((str(name) for name, value in list(values.items()) if value is thing), "")


def key_of(values: dict, thing: object) -> object:
    """The key of a value in a dictionary, or None."""
    return next((key for key, value in list(dict.items(values)) if value is thing), None)


def attribute_of(owner: object, thing: object) -> str:
    with contextlib.suppress(Exception):
        values = vars(owner) if is_a(owner, type) else owner.__dict__
        if name := name_in(dict(values), thing):
            return name
    for kind in type(owner).__mro__:
        for name, slot in vars(kind).items():
            with contextlib.suppress(Exception):
                if inspect.ismemberdescriptor(slot) and slot.__get__(owner) is thing:
                    return name
    return ""
