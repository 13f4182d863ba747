"""Counts what operators return, while they run: a limit for a device whose allocator has none."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memlab.meters.gradient_sums import is_gradient_sum
from memlab.meters.live import live_storages, storages, tensors_in


@dataclass(slots=True)
class Held:
    """A storage that counts: its bytes, since when (nanoseconds), and whether it was made with
    gradients enabled.
    """

    bytes: int
    address: int
    since: int
    with_grad: bool
    reference: weakref.ref | None = None


class Counter(TorchDispatchMode):
    """Counts the storages that operators return, and says when there are too many bytes of them.

    What an operator takes for itself and gives back, and what compiled code makes, is not seen.

    Args:
        device: whose storages count.
        limit: the most bytes alive at once.
        passed: called with the bytes asked for and the operator's name; it returns the error to
            raise.
    """

    #: What operators take for themselves is not seen here.
    sees_scratch = False

    def __init__(
        self, device: torch.device, limit: int, passed: Callable[[int, str], BaseException]
    ):
        super().__init__()
        self.device = device
        self.limit = limit
        self._passed = passed
        # By the storage's identity, since its address changes when it is resized.
        self._alive: dict[int, Held] = {}
        self._total = 0
        #: A sum of gradients that passed the limit: the bytes asked for, and the operator.
        self._waiting: tuple[int, str] | None = None

    def start(self) -> None:
        """Count what is alive, and from now on what operators make."""
        for storage in live_storages(self.device).values():
            self._add(storage)
        self.__enter__()

    def stop(self) -> None:
        """Count no longer, and follow no storage that is still alive."""
        self.__exit__(None, None, None)
        self._alive.clear()

    def bytes_alive(self) -> int:
        """Bytes that count against the limit now."""
        return self._total

    def held(self) -> list[Held]:
        """The storages that count now."""
        return list(self._alive.values())

    def _add(self, storage: torch.UntypedStorage) -> int:
        """Count a storage as it is now; how many bytes that adds."""
        key, size = id(storage), storage.nbytes()
        held = self._alive.get(key)
        if held is None:
            # A memory map takes the file's room.
            if not size or storage.filename is not None:
                return 0

            def gone(reference: weakref.ref, key: int = key) -> None:
                if key in self._alive and self._alive[key].reference is reference:
                    self._total -= self._alive.pop(key).bytes

            reference = weakref.ref(storage, gone)
            held = self._alive[key] = Held(0, 0, 0, torch.is_grad_enabled(), reference)
        added = size - held.bytes
        if added or held.address != storage.data_ptr():
            held.bytes, held.address, held.since = size, storage.data_ptr(), time.time_ns()
            self._total += added
        return added

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._settle()
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if tensor.device != self.device:
                continue
            added = 0
            with contextlib.suppress(Exception):  # no memory of its own (functional)
                for storage in storages(tensor):
                    if storage.device == self.device:  # else it is fake
                        added += self._add(storage)
            if added > 0 and self._total > self.limit:
                self._waiting = (added, str(function.overloadpacket))
                # Autograd adds gradients up in place, but not under a mode like this one. Here the
                # first of the two goes when the sum is there: what counts is what is left then.
                if not is_gradient_sum(function, args):
                    self._settle()
        return result

    def _settle(self) -> None:
        """Raise if too many bytes are alive since the last operator."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and self._total > self.limit:
            raise self._passed(*waiting)
