"""The storages of a run on fake tensors: each one's birth, its size, its end."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence

import torch

from memlab.meters.gradient_sums import Made, Sums
from memlab.meters.live import type_of
from memlab.meters.scratch import Scratch, lives_of

__all__ = ["FakeStorages", "Made"]


class FakeStorages:
    """Notes storages once, and by weak references when they are gone.

    Args:
        on_event: called with a device's type and what was made or is gone there.
    """

    def __init__(self, on_event: Callable[[str, Made], None]):
        self._sums = Sums(on_event)
        #: Called when the next operator runs, and at the end.
        self.settle = self._sums.settle
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
        return self._sums.place_of(self._own_address(storage))

    def device_of(self, storage: torch.UntypedStorage) -> torch.device | None:
        """Where a storage that the run made would be; None for any other."""
        known = self._sizes.get(self._own_address(storage))
        if known is None:
            return None
        return torch.device("cuda", 0) if known[0] == "cuda" else torch.device(known[0])

    def _own_address(self, storage: torch.UntypedStorage) -> int:
        known = self._addresses.get(id(storage))
        return known[0] if known is not None else 0

    def see(self, tensor: torch.Tensor, sum_with: torch.Tensor | None = None) -> None:
        """Note the storage behind a tensor, if it is new.

        Args:
            tensor: what an operator gave.
            sum_with: the gradient to which another one was added, if the tensor is their sum.
        """
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
                self._sums.gone(device, Made(self.now(), address, -size))

        device, size = tensor.device.type, storage.nbytes()
        self._addresses[identity] = address, weakref.ref(storage, gone)
        self._sizes[address] = device, size
        if size:
            made = Made(self.now(), address, size, *type_of(tensor, storage))
            first = self._own_address(sum_with.untyped_storage()) if sum_with is not None else 0
            self._sums.made(device, made, sum_with=first)

    def note_size(self, storage: torch.UntypedStorage) -> None:
        """Note that a storage was given another size, as FSDP does to free what it holds."""
        address = self._own_address(storage)
        if not address:
            return
        device, before = self._sizes[address]
        size = storage.nbytes()
        if size == before:
            return
        self._sizes[address] = device, size
        if before:
            self._sums.gone(device, Made(self.now(), address, -before))
        if size:
            self._sums.made(device, Made(self.now(), address, size))

    def take(self, buffers: Sequence[Scratch]) -> None:
        """Note what a kernel takes for itself on the GPU, and that it gives it back."""
        first = self._made + 1
        self._made += len(buffers)
        for number, taken in lives_of(buffers):
            size = buffers[number].size
            if taken:
                self._sums.made("cuda", Made(self.now(), first + number, size))
            else:
                self._sums.gone("cuda", Made(self.now(), first + number, -size))
