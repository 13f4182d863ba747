"""The allocator itself: it takes segments from the driver, splits them into blocks, and keeps what
is freed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from memlab.meters.allocator import cache, expandable
from memlab.meters.allocator.blocks import Block, Pool, Ties, merge_neighbours, put_before
from memlab.meters.allocator.driver import Driver
from memlab.meters.allocator.out_of_memory import OutOfMemory
from memlab.meters.allocator.replay import replay
from memlab.meters.allocator.settings import SMALL_SIZE, Settings
from memlab.meters.allocator.snapshot import SegmentInfo, segments_of


class Allocator:
    """CUDA's caching allocator for one device (DeviceCachingAllocator), without a device.

    Addresses are made up, and each segment's is higher than the one's before: the driver's real
    ones are not known. They matter only between free blocks of the same size (`Ties`).

    Args:
        settings: those of `PYTORCH_ALLOC_CONF`; None: the defaults.
        limit: bytes that the driver can give to PyTorch in all; None: no end.
        allowed: bytes that `torch.cuda.set_per_process_memory_fraction` allows; None: all.
        ties: whose release's rule holds between free blocks of the same size.

    Raises:
        ValueError: a limit is not a number of bytes.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        limit: int | None = None,
        allowed: int | None = None,
        ties: Ties = Ties.SEGMENT,
    ):
        for name, value in (("limit", limit), ("allowed", allowed)):
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name} is a number of bytes, or None, not {value!r}")
        self.settings = settings or Settings()
        self.allocated_bytes = 0
        self.active_bytes = 0  # with what was freed while another stream may still use it
        self.peak_allocated_bytes = 0
        self.peak_active_bytes = 0
        self._driver = Driver(limit, allowed)
        numbers = itertools.count()
        self._small = Pool(True, Ties(ties), numbers)
        self._large = Pool(False, Ties(ties), numbers)
        self._active: dict[int, Block] = {}  # by address: allocated or pending

    @property
    def reserved_bytes(self) -> int:
        """Bytes held of the device: in use, or cached."""
        return self._driver.taken

    @property
    def peak_reserved_bytes(self) -> int:
        return self._driver.most_taken

    def allocate(self, size: int, stream: int = 0) -> int:
        """Find a block for `size` bytes (malloc).

        Returns:
            Its address. A request of no bytes gets none and is not counted: 0, the null pointer, as
            in PyTorch (NativeCachingAllocator::allocate).

        Raises:
            OutOfMemory: the driver has too little, also after what was cached and not split was
                given back. As in PyTorch, that stays given back.
            ValueError: `size` is not a number of bytes.
        """
        if type(size) is not int or size < 0:
            raise ValueError(f"an allocation is of a number of bytes, not {size!r}")
        if size == 0:
            return 0
        rounded = self.settings.round_size(size)
        pool = self._small if rounded <= SMALL_SIZE else self._large  # get_pool
        block = cache.find(pool, stream, rounded, self.settings)
        if block is None:
            block = self._obtain(pool, stream, rounded)
        if block is None:
            raise OutOfMemory(
                asked=size,
                tried=self.settings.segment_size(rounded),
                allocated=self.allocated_bytes,
                reserved=self.reserved_bytes,
                limit=self._driver.limit,
                allowed=self._driver.allowed,
                advise_expandable=not self.settings.expandable_segments,
            )
        if cache.should_split(block, rounded, self.settings):
            # alloc_found_block: the front is handed out, the rest stays free.
            front = pool.part_of(block, block.address, rounded)
            put_before(front, block)
            block.address += rounded
            block.size -= rounded
            pool.put(block)
            block = front
        block.allocated = True
        self._active[block.address] = block
        self.allocated_bytes += block.size
        self.active_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        self.peak_active_bytes = max(self.peak_active_bytes, self.active_bytes)
        return block.address

    def free(self, address: int) -> None:
        """Take back what `allocate` handed out. The null pointer is no block, and nothing happens.

        There is no time here, so there is no `record_stream`: a block can be had again at once, as
        if no other stream were ever behind. Where one was, its block is reused later and more is
        reserved. A recorded history tells when that was, and `replay` follows it.

        Raises:
            ValueError: nothing is allocated at this address.
        """
        if address == 0:
            return
        self.request_free(address)
        self.complete_free(address)

    def request_free(self, address: int) -> None:
        """The first half of `free`: no longer allocated, and not yet free (free_requested).

        Raises:
            ValueError: nothing is allocated at this address.
        """
        block = self._active.get(address)
        if block is None or block.pending:
            raise ValueError(
                f"nothing is allocated at address {address!r}: it was freed before, or never handed"
                " out. Free what allocate returned, once"
            )
        block.allocated = False
        block.pending = True
        self.allocated_bytes -= block.size

    def complete_free(self, address: int) -> None:
        """The second half: no stream uses the block any more, and it is free (free_block).

        Raises:
            ValueError: no free was requested at this address.
        """
        block = self._active.get(address)
        if block is None or not block.pending:
            raise ValueError(
                f"no free was requested at address {address!r}: call request_free first"
            )
        del self._active[address]
        block.pending = False
        self.active_bytes -= block.size
        merge_neighbours(block)
        block.pool.put(block)

    def is_pending(self, address: int) -> bool:
        """Whether a free was requested at this address and is not complete."""
        block = self._active.get(address)
        return block is not None and block.pending

    def empty_cache(self) -> None:
        """Give all segments back of which nothing is in use, and the unused pages of expandable
        ones (release_cached_blocks).
        """
        # synchronize_and_free_events: the streams are waited for.
        for address in [address for address, block in self._active.items() if block.pending]:
            self.complete_free(address)
        for pool in (self._large, self._small):  # release_blocks
            for block in pool.free_blocks():
                if block.expandable is not None:
                    expandable.unmap(self._driver, block)
                elif not block.is_split():
                    cache.release(self._driver, block)

    def release_segment(self, address: int) -> None:
        """Give the segment back that begins at an address, if it is whole and free."""
        for pool in (self._large, self._small):
            for block in pool.free_blocks():
                if block.address == address and not block.is_split():
                    cache.release(self._driver, block)

    def snapshot(self) -> list[SegmentInfo]:
        """The segments by address, each with its blocks."""
        blocks = list(self._active.values())
        for pool in (self._large, self._small):
            blocks += pool.free_blocks() + pool.unmapped_blocks()
        return segments_of(block for block in blocks if block.preceding is None)

    def replay(self, events: Iterable[tuple[str, int, int, int]]) -> None:
        """Do what a recorded history did: see `memlab.meters.allocator.replay`.

        Args:
            events: (action, address, size in bytes, stream) of each event, in order.

        Raises:
            ValueError: the history does not begin with an empty allocator, or an action is unknown.
            OutOfMemory: as `allocate`.
        """
        replay(self, self._driver, events)

    def _obtain(self, pool: Pool, stream: int, size: int) -> Block | None:
        """A block of new memory, for which cached memory is given back where it has to be."""
        if self.settings.garbage_collection_threshold and self._driver.allowed is not None:
            cache.collect_garbage(
                self._driver, self._large, self.settings.garbage_collection_threshold
            )
        block = self._from_driver(pool, stream, size)
        if block is None and cache.release_oversize(
            self._driver, pool, stream, size, self.settings.max_split_size
        ):
            block = self._from_driver(pool, stream, size)
        if block is None:
            self.empty_cache()
            block = self._from_driver(pool, stream, size)
        return block

    def _from_driver(self, pool: Pool, stream: int, size: int) -> Block | None:
        """A new segment as a block, or an expandable one's new pages (alloc_block)."""
        asked = self.settings.segment_size(size)
        if not self._driver.allows(asked):
            return None
        if self.settings.expandable_segments:
            return expandable.allocate(
                self._driver, pool, stream, size, self.settings.large_segment_size
            )
        if not self._driver.take(asked):
            return None
        return pool.first_block(stream, self._driver.address_for(asked), asked)
