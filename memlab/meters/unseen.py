"""What is alive and in no tensor of Python, such as what a graph saved, between two recordings."""

from __future__ import annotations

import torch

from memlab.ledger import BUCKET, Ledger
from memlab.meters.heap import heap_in_use
from memlab.meters.live import live_storages
from memlab.meters.recording import Recording
from memlab.meters.reducers import bucket_bytes
from memlab.units import KiB

#: Less than this is what a heap breathes.
LEAST_BY_HEAP = 256 * KiB


class Unseen:
    """Carries from one recording to the next what the next one cannot see.

    What was left when a recording ended is known to the byte. What came to it since then, only the
    host's heap tells, where other things lie as well.

    Args:
        device: whose bytes.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._bytes: int | None = None  # not known yet
        self._heap: int | None = None

    def note_in(self, recording: Recording) -> None:
        """Count it in a recording that has just begun."""
        buckets = bucket_bytes(self._device)
        rest = 0
        if self._bytes is not None:
            rest = max(0, self._bytes - sum(buckets))
        for size in buckets:
            recording.note_unseen(size, "gradients", BUCKET)
        if rest:
            recording.note_unseen(rest, "kept", "a graph's, or what else C++ holds")
        heap = self._heap_beside()
        if heap is not None and self._heap is not None and heap - self._heap >= LEAST_BY_HEAP:
            name = "from steps not recorded in full, by the heap"
            recording.note_unseen(heap - self._heap, "unattributed", name)

    def held(self) -> int:
        """The bytes that tensors hold now."""
        return sum(storage.nbytes() for storage in live_storages(self._device).values())

    def recorded(self, ledger: Ledger, held: int) -> None:
        """Note what a recording has left.

        Args:
            ledger: the recording's.
            held: what tensors held when it ended.
        """
        alive = sum(block.bytes for block in ledger.alive_at(ledger.end))
        self._bytes = max(0, alive - held)
        self._heap = self._heap_beside()

    def _heap_beside(self) -> int | None:
        """The bytes on the heap that no tensor holds; None where the heap does not say."""
        heap = heap_in_use()
        return None if heap is None else heap - self.held()
