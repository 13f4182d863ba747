"""Expandable segments: one a stream and pool, which grows and shrinks by pages.

The rules and their reasons are in "Note [Expandable Segments]" of CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from memlab.meters.allocator.blocks import (
    Block,
    Pool,
    merge_neighbours,
    put_before,
    put_behind,
)
from memlab.meters.allocator.driver import Driver
from memlab.meters.allocator.settings import SMALL_BUFFER


@dataclass(frozen=True, eq=False)
class ExpandableSegment:
    """A range of addresses, of which whole pages are mapped to memory.

    Attributes, in bytes: `address`; `size` of the addresses; `page`: 2 MiB in the small pool, and
    the size of a large segment (20 MiB) in the large one.
    """

    address: int
    size: int
    page: int


def allocate(driver: Driver, pool: Pool, stream: int, size: int, large: int) -> Block | None:
    """A free block of at least `size` bytes that is in no list: pages are mapped until there is
    one (try_allocate_expandable_block).

    Args:
        large: bytes of a page in the large pool.

    Returns:
        The block; None where the driver has no memory. The pages that were mapped until then stay,
        as free blocks.
    """
    block = _find_room(driver, pool, stream, size, large)
    if not block.mapped and not _map(driver, block, min(block.size, size)):
        return None
    while block.size < size:
        unmapped = block.following
        if not _map(driver, unmapped, min(size - block.size, unmapped.size)):
            return None
        block = unmapped  # it has taken the one before it in
    pool.remove(block)
    return block


def _find_room(driver: Driver, pool: Pool, stream: int, size: int, large: int) -> Block:
    """The block at the lowest address from which on `size` bytes are free, mapped or not
    (find_expandable_block). Where there is none, a new segment is begun.
    """
    for _, block in pool.unmapped.get(stream, ()):
        before = block.preceding
        first = before if before is not None and before.is_free() else block
        room = 0
        block = first
        while block is not None and block.is_free() and room < size:
            room += block.size
            block = block.following
        if room >= size:
            return first
    page = SMALL_BUFFER if pool.small else large
    space = -(-max(driver.address_space(), size) // page) * page
    segment = ExpandableSegment(driver.address_for(space), space, page)
    block = pool.first_block(stream, segment.address, space)
    block.mapped = False
    block.expandable = segment
    pool.put(block)
    return block


def _map(driver: Driver, block: Block, size: int) -> bool:
    """Map as many pages at the front of an unmapped block as `size` bytes need (map_block)."""
    page = block.expandable.page
    mapped = -(-size // page) * page
    if not driver.take(mapped):
        return False
    pool = block.pool
    pool.remove(block)
    block.mapped = True
    if mapped < block.size:
        rest = pool.part_of(block, block.address + mapped, block.size - mapped)
        rest.mapped = False
        put_behind(rest, block)
        pool.put(rest)
        block.size = mapped
    merge_neighbours(block)
    pool.put(block)
    return True


def unmap(driver: Driver, block: Block) -> None:
    """Give back the whole pages inside of a free block (unmap_block), and a segment of which
    nothing is left (release_expandable_segment).
    """
    segment, pool = block.expandable, block.pool
    first_page = -(-(block.address - segment.address) // segment.page)
    end_page = (block.address + block.size - segment.address) // segment.page
    if first_page >= end_page:
        return
    address = segment.address + first_page * segment.page
    size = (end_page - first_page) * segment.page
    pool.remove(block)

    in_front = address - block.address
    if in_front:
        part = pool.part_of(block, block.address, in_front)
        put_before(part, block)
        pool.put(part)
    behind = block.size - in_front - size
    if behind:
        part = pool.part_of(block, address + size, behind)
        put_behind(part, block)
        pool.put(part)

    block.address = address
    block.size = size
    block.mapped = False
    merge_neighbours(block)
    pool.put(block)
    driver.give_back(size)
    if not block.is_split():
        pool.remove(block)
