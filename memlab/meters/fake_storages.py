"""The storages of a run on fake tensors: each one's birth, its size, its end."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from memlab.meters.live import type_of
from memlab.meters.scratch import Scratch, lives_of


class Made(NamedTuple):
    """A storage that the run made, or one that is gone (`size` is negative)."""

    time: int
    address: int
    size: int
    dtype: str = ""
    shape: tuple[int, ...] | None = None


class FakeStorages:
    """Notes storages once, and by weak references when they are gone.

    Args:
        on_event: called with a device's type and what was made or is gone there.
    """

    def __init__(self, on_event: Callable[[str, Made], None]):
        self._on_event = on_event
        self._addresses: dict[int, tuple[int, weakref.ref]] = {}
        self._sizes: dict[int, tuple[str, int]] = {}  # address -> the device, the bytes now
        self._made = 0
        self._last = 0

    def now(self) -> int:
        """A moment later than all before (nanoseconds)."""
        self._last = max(time.time_ns(), self._last + 1)
        return self._last

    def address_of(self, storage: torch.UntypedStorage) -> int:
        """The made-up address of a storage that the run made; 0 for any other."""
        known = self._addresses.get(id(storage))
        return known[0] if known is not None else 0

    def see(self, tensor: torch.Tensor) -> None:
        """Note the storage behind a tensor, if it is new."""
        if tensor.layout is torch.sparse_coo:
            self.see(tensor._indices())
            return self.see(tensor._values())
        storage = tensor.untyped_storage()
        identity = id(storage)
        if identity in self._addresses:
            return
        self._made += 1
        address = self._made

        def gone(reference: weakref.ref) -> None:
            self._addresses.pop(identity, None)
            device, size = self._sizes.pop(address)
            if size:
                self._on_event(device, Made(self.now(), address, -size))

        device, size = tensor.device.type, storage.nbytes()
        self._addresses[identity] = address, weakref.ref(storage, gone)
        self._sizes[address] = device, size
        if size:
            self._on_event(device, Made(self.now(), address, size, *type_of(tensor, storage)))

    def note_size(self, storage: torch.UntypedStorage) -> None:
        """Note that a storage was given another size, as FSDP does to free what it holds."""
        address = self.address_of(storage)
        if not address:
            return
        device, before = self._sizes[address]
        size = storage.nbytes()
        if size == before:
            return
        self._sizes[address] = device, size
        if before:
            self._on_event(device, Made(self.now(), address, -before))
        if size:
            self._on_event(device, Made(self.now(), address, size))

    def take(self, buffers: Sequence[Scratch]) -> None:
        """Note what a kernel takes for itself on the GPU, and that it gives it back."""
        first = self._made + 1
        self._made += len(buffers)
        for number, taken in lives_of(buffers):
            size = buffers[number].size if taken else -buffers[number].size
            self._on_event("cuda", Made(self.now(), first + number, size))
