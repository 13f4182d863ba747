"""Which storages a run used, and until when each of them lived."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass

import torch


@dataclass(slots=True, eq=False)
class Use:
    """A storage that the run used: from when it was first seen until it was gone (nanoseconds;
    None: not yet).

    `shared`: it is shared memory without a file, as that in which a data loader's workers send.
    """

    address: int
    bytes: int
    seen: int
    gone: int | None = None
    shared: bool = False
    reference: weakref.ref | None = None


class Uses:
    """Notes storages, and keeps none of them alive."""

    def __init__(self) -> None:
        self.found: list[Use] = []
        self._at: dict[int, Use] = {}

    def note(self, storage: torch.UntypedStorage, address: int, now: int) -> None:
        """Note that a storage is used, unless it is known.

        Args:
            storage: the storage.
            address: where it is.
            now: the moment (nanoseconds).
        """
        use = self._at.get(address)
        if use is not None and use.gone is None and use.bytes == storage.nbytes():
            return
        shared = storage.device.type == "cpu" and storage.is_shared() and storage.filename is None
        self._at[address] = use = Use(address, storage.nbytes(), now, shared=shared)
        self.found.append(use)

        def gone(reference: weakref.ref, use: Use = use) -> None:
            use.gone = time.time_ns()

        use.reference = weakref.ref(storage, gone)

    def end(self) -> None:
        """Follow none of them any longer."""
        for use in self.found:
            use.reference = None
