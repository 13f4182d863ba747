"""What is kept of freed memory: which block of it is taken, and which are given back."""

from __future__ import annotations

from bisect import bisect_left

from memlab.meters.allocator.blocks import Block, Pool
from memlab.meters.allocator.driver import Driver
from memlab.meters.allocator.settings import MIN_BLOCK_SIZE, SMALL_SIZE, Settings


def find(pool: Pool, stream: int, size: int, settings: Settings) -> Block | None:
    """Take the smallest free block of the stream that is large enough out of its pool
    (get_free_block); None where there is none that may be used.
    """
    if settings.garbage_collection_threshold:
        pool.searches += 1
    blocks = pool.free.get(stream, ())
    index = bisect_left(blocks, (size,))
    if index == len(blocks):
        return None
    if settings.expandable_segments:
        # A block that can grow counts as large as it can become, so one that cannot is taken first.
        while index + 1 < len(blocks) and _room(blocks[index + 1][-1]) < _room(blocks[index][-1]):
            index += 1
    block = blocks[index][-1]
    if not settings.is_oversize(size):
        if settings.is_oversize(block.size):
            return None
    else:
        # An oversize block is handed out whole, so it must not be much too large.
        rounding = settings.max_non_split_rounding or settings.large_segment_size
        if block.size >= size + rounding:
            return None
    del blocks[index]
    return block


def _room(block: Block) -> int:
    """Bytes of a block and of the unmapped addresses behind it."""
    behind = block.following
    return block.size + (0 if behind is None or behind.mapped else behind.size)


def should_split(block: Block, size: int, settings: Settings) -> bool:
    """Whether what a block has more than `size` becomes a block of its own (should_split)."""
    rest = block.size - size
    if block.pool.small or settings.expandable_segments:
        return rest >= MIN_BLOCK_SIZE
    return rest > SMALL_SIZE and not settings.is_oversize(size)


def release(driver: Driver, block: Block) -> None:
    """Give a whole segment that is free back to the driver (release_block)."""
    block.pool.remove(block)
    driver.give_back(block.size)


def release_oversize(
    driver: Driver, pool: Pool, stream: int, size: int, max_split: int | None
) -> bool:
    """Give one free block back that is large enough, or several of those that are not split, the
    largest first (release_available_cached_blocks).

    Returns:
        Whether as much was given back as is needed. Without `max_split_size` nothing is.
    """
    if max_split is None:
        return False
    enough = max(size, max_split)
    blocks = pool.free.get(stream, ())
    index = bisect_left(blocks, (enough,))
    if index < len(blocks) and blocks[index][-1].expandable is None:
        release(driver, blocks[index][-1])
        return True
    released = 0
    for *_, block in reversed(blocks[:index]):
        if released >= enough or block.size < max_split:
            break
        if block.expandable is None:
            released += block.size
            release(driver, block)
    return released >= enough


def collect_garbage(driver: Driver, pool: Pool, threshold: float) -> None:
    """Give back segments of the large pool that have not been used for longest, until no more is
    held than a part of what is allowed (garbage_collect_cached_blocks). A block's age is how often
    its pool was searched since it was freed.
    """
    excess = driver.taken - int(threshold * driver.allowed)
    blocks = [block for block in pool.free_blocks() if not block.is_split()]
    while excess > 0 and blocks:
        average = sum(pool.searches - block.searches for block in blocks) / len(blocks)
        # All that are older than the average go, more than need be: so it is not soon needed again.
        for block in [b for b in blocks if pool.searches - b.searches >= average]:
            excess -= block.size
            blocks.remove(block)
            release(driver, block)
