"""What the driver has: bytes to give, and addresses."""

from __future__ import annotations

from memlab.units import MiB, TiB

# Where the made-up addresses of segments begin. The driver's real ones are all below this.
_FIRST_ADDRESS = 1 << 47

# What the driver aligns large allocations to.
_ALIGNMENT = 2 * MiB


class Driver:
    """Counts what is taken of the device. Nothing is allocated.

    Args:
        limit: bytes it can give in all; None: no end.
        allowed: bytes of it that this process may take, as `set_per_process_memory_fraction` sets
            them; None: all.
    """

    def __init__(self, limit: int | None, allowed: int | None):
        self.limit = limit
        self.allowed = allowed
        self.taken = 0
        self.most_taken = 0
        # (address, size) of the segments that a recorded history took next: see replay.
        self.recorded: list[tuple[int, int]] = []
        self._next_address = _FIRST_ADDRESS

    def take(self, size: int) -> bool:
        """Take `size` bytes; False where there are not so many."""
        if self.limit is not None and self.taken + size > self.limit:
            return False
        self.taken += size
        self.most_taken = max(self.most_taken, self.taken)
        return True

    def give_back(self, size: int) -> None:
        self.taken -= size

    def allows(self, size: int) -> bool:
        """Whether the process may take so much more (allowed_memory_maximum)."""
        return self.allowed is None or self.taken + size <= self.allowed

    def address_for(self, size: int) -> int:
        """Where a new segment begins: at the recorded address where one of this size is known, else
        behind the last one, with a gap, as neighbouring segments are no neighbours for the
        allocator.
        """
        if self.recorded and self.recorded[0][1] == size:
            return self.recorded.pop(0)[0]
        address = self._next_address
        self._next_address += -(-size // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT
        return address

    def address_space(self) -> int:
        """Bytes of addresses that an expandable segment sets aside: an eighth more than the device
        has (ExpandableSegment), of 1 TiB where that is unknown.
        """
        total = TiB if self.limit is None else self.limit
        return total + total // 8
