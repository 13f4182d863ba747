"""The buckets of `DistributedDataParallel`: what its reducer sums over the ranks, as large as all
gradients. C++ holds them, so no tensor of Python shows them; it is known when they are made.

Source: https://docs.pytorch.org/docs/stable/notes/ddp.html, "Internal Design".
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from memlab.ledger import Span
from memlab.meters.listening import method_watched
from memlab.meters.live import live_objects


class Reducers:
    """Tells when buckets may be made: while the wrapper is built and, once, at the beginning of its
    second forward, in the order in which gradients came.

    Args:
        note: called with each such span, of the kind "reducer".
    """

    def __init__(self, note: Callable[[Span], None]):
        self._note = note
        self._entered = 0

    def entered(self, module: torch.nn.Module, now: int) -> None:
        """A module is called: what its wrapper did before is over."""
        if self._entered:
            self._note(Span(self._entered, now, "reducer"))
        self._entered = now if isinstance(module, DistributedDataParallel) else 0

    def seen(self) -> contextlib.AbstractContextManager[None]:
        """Inside, see also those that are built."""

        def built(nothing: None, began: int) -> None:
            self._note(Span(began, time.time_ns(), "reducer"))

        return method_watched(DistributedDataParallel, "__init__", built)


def bucket_bytes(device: torch.device) -> list[int]:
    """The bytes of the buckets that are there now and that no tensor shows.

    Args:
        device: whose bytes.

    Returns:
        Those of each wrapper that has some.
    """
    sizes = []
    for wrapper in live_objects(DistributedDataParallel):
        with contextlib.suppress(AttributeError):  # one that is just being built
            trained = [p for p in wrapper.parameters() if p.requires_grad and p.device == device]
            shown = wrapper.gradient_as_bucket_view and any(p.grad is not None for p in trained)
            sizes.append(0 if shown else sum(p.numel() * p.element_size() for p in trained))
    return [size for size in sizes if size]
