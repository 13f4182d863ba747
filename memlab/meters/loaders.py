"""What a data loader returns: the batch, whether or not a module is ever given it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from torch.utils.data import dataloader

_listening: list[Callable[[object], None]] = []


@contextlib.contextmanager
def batches_shown(show: Callable[[object], None]) -> Iterator[None]:
    """Inside, show what the iterators of `torch.utils.data.DataLoader` return. So do those of
    accelerate, of Hugging Face's `Trainer` and of Lightning, which are made of them.

    Args:
        show: called with each batch, before the loop has it.
    """
    # An epoch may have begun already, so its iterator is there, and only its class can be changed.
    kind = dataloader._BaseDataLoaderIter
    if not _listening:
        kind.__next__ = _showing(kind.__next__)
    _listening.append(show)
    try:
        yield
    finally:
        # Those who listen may leave in any order: a watch ends inside a budget.
        _listening.remove(show)
        if not _listening:
            kind.__next__ = kind.__next__.__wrapped__


def _showing(fetch: Callable[[object], object]) -> Callable[[object], object]:
    @functools.wraps(fetch)
    def __next__(iterator: object) -> object:
        batch = fetch(iterator)
        for show in list(_listening):
            show(batch)
        return batch

    return __next__
