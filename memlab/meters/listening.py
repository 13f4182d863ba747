"""One method of a class of PyTorch, watched by as many as want to."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

# For each method that is watched now: who is told.
_listening: dict[tuple[type, str], list[Callable]] = {}


@contextlib.contextmanager
def method_watched(owner: type, name: str, listener: Callable[..., None]) -> Iterator[None]:
    """Inside, tell a listener of each call of a method after it.

    Args:
        owner: the class. It has the method itself; its objects that are there already count, too.
        name: the method's name.
        listener: called with what the method returned and with when it began (nanoseconds).
    """
    listeners = _listening.setdefault((owner, name), [])
    if not listeners:
        setattr(owner, name, _telling(getattr(owner, name), listeners))
    listeners.append(listener)
    try:
        yield
    finally:
        # Those who listen may leave in any order: a watch ends inside a budget.
        listeners.remove(listener)
        if not listeners:
            setattr(owner, name, getattr(owner, name).__wrapped__)
            del _listening[owner, name]


def _telling(method: Callable, listeners: list[Callable]) -> Callable:
    @functools.wraps(method)
    def told(self: object, *args: object, **kwargs: object) -> object:
        began = time.time_ns()
        result = method(self, *args, **kwargs)
        for listener in list(listeners):
            listener(result, began)
        return result

    return told
