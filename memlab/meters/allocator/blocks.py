"""Blocks, the pools that hold the free ones, and how two blocks become one again."""

from __future__ import annotations

import enum
import itertools
from bisect import bisect_left, insort


class Ties(enum.StrEnum):
    """Which of several free blocks of the same size and stream is taken. It was another rule in
    each release of 2026; the names are those of the comparison in the released `libc10_cuda.so`.
    """

    # torch 2.11 (BlockComparatorSize): the one at the lowest address.
    ADDRESS = "address"

    # torch 2.12 and 2.12.1 (BlockComparatorRegistrationCounter, PR 178362): the one that was made
    # first. When a block is split, the part in front is made anew and the rest stays what it was.
    BLOCK = "block"

    # torch 2.13 and 2.14 (BlockComparatorSizeCounterAddress, PR 183591): the one whose segment is
    # the oldest, and in a segment the one at the lowest address. PR 182929 is in no release: 183591
    # took its place before 2.13.
    SEGMENT = "segment"

    @classmethod
    def of(cls, torch_version: str) -> Ties:
        """The rule of a release of PyTorch, such as `"2.12.0+cu130"`."""
        major, minor = (int(number) for number in torch_version.split(".")[:2])
        if (major, minor) < (2, 12):
            return cls.ADDRESS
        return cls.BLOCK if (major, minor) == (2, 12) else cls.SEGMENT


class Block:
    """A range of addresses: free, allocated, or part of an expandable segment and not mapped."""

    __slots__ = (
        "address",
        "allocated",
        "expandable",
        "following",
        "mapped",
        "order",
        "pending",
        "pool",
        "preceding",
        "searches",
        "size",
        "stream",
    )

    def __init__(self, pool: Pool, stream: int, address: int, size: int, order: int):
        self.pool = pool
        self.stream = stream
        self.address = address
        self.size = size
        self.order = order  # what decides between blocks of one size, before the address does
        self.preceding: Block | None = None  # its neighbours in the same segment
        self.following: Block | None = None
        self.allocated = False
        self.pending = False  # freed, but another stream may still use it
        self.mapped = True
        self.expandable = None  # the expandable segment that it is a part of
        self.searches = 0  # how often its pool had been searched when it was freed

    def is_split(self) -> bool:
        """Whether it is only a part of its segment (is_split)."""
        return self.preceding is not None or self.following is not None

    def is_free(self) -> bool:
        return not self.allocated and not self.pending


class Pool:
    """The free blocks of the small or of the large pool (BlockPool), by stream: a block is reused
    on the stream that it was allocated on, and on no other.
    """

    def __init__(self, small: bool, ties: Ties, numbers: itertools.count):
        self.small = small
        self.searches = 0  # get_free_blocks_call_count
        # Sorted lists: of (size, order, address, block) and of (address, block).
        self.free: dict[int, list[tuple[int, int, int, Block]]] = {}
        self.unmapped: dict[int, list[tuple[int, Block]]] = {}
        self._ties = ties
        self._numbers = numbers

    def first_block(self, stream: int, address: int, size: int) -> Block:
        """A new segment as one block."""
        order = 0 if self._ties is Ties.ADDRESS else next(self._numbers)
        return Block(self, stream, address, size, order)

    def part_of(self, block: Block, address: int, size: int) -> Block:
        """A new block in the segment of another, not yet between its neighbours."""
        order = next(self._numbers) if self._ties is Ties.BLOCK else block.order
        part = Block(self, block.stream, address, size, order)
        part.expandable = block.expandable
        return part

    def put(self, block: Block) -> None:
        """Keep a block that is free or not mapped."""
        if block.mapped:
            block.searches = self.searches
            entry = (block.size, block.order, block.address, block)
            insort(self.free.setdefault(block.stream, []), entry)
        else:
            insort(self.unmapped.setdefault(block.stream, []), (block.address, block))

    def remove(self, block: Block) -> None:
        """Keep a block no longer. Its size and address have to be those it was put with."""
        if block.mapped:
            blocks = self.free[block.stream]
            del blocks[bisect_left(blocks, (block.size, block.order, block.address))]
        else:
            blocks = self.unmapped[block.stream]
            del blocks[bisect_left(blocks, (block.address,))]

    def free_blocks(self) -> list[Block]:
        """All that are free and mapped, in the order in which they would be given away."""
        return [entry[-1] for stream in sorted(self.free) for entry in self.free[stream]]

    def unmapped_blocks(self) -> list[Block]:
        return [block for blocks in self.unmapped.values() for _, block in blocks]


def put_before(block: Block, following: Block) -> None:
    """Make `block` the neighbour in front of `following`."""
    block.preceding = following.preceding
    if block.preceding is not None:
        block.preceding.following = block
    block.following = following
    following.preceding = block


def put_behind(block: Block, preceding: Block) -> None:
    """Make `block` the neighbour behind `preceding`."""
    block.following = preceding.following
    if block.following is not None:
        block.following.preceding = block
    block.preceding = preceding
    preceding.following = block


def merge_neighbours(block: Block) -> None:
    """Take the neighbours that are as free as it into a block that is in no list yet
    (try_merge_blocks).
    """
    before = block.preceding
    if before is not None and before.is_free() and before.mapped == block.mapped:
        block.pool.remove(before)
        block.address = before.address
        block.size += before.size
        block.preceding = before.preceding
        if block.preceding is not None:
            block.preceding.following = block
    behind = block.following
    if behind is not None and behind.is_free() and behind.mapped == block.mapped:
        block.pool.remove(behind)
        block.size += behind.size
        block.following = behind.following
        if block.following is not None:
            block.following.preceding = block
