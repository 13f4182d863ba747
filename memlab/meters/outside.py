"""What a run used and the device's allocator did not hand out, each with its life."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memlab.ledger import Block, Ledger, Observation, lives
from memlab.meters.recorded import Recorded
from memlab.meters.uses import Use


class Outside(NamedTuple):
    """The most bytes at once: of everything outside, without the memory maps (files and shared
    memory), of the shared memory in which a data loader's workers send, and of NumPy's arrays.
    """

    bytes: int
    memory_bytes: int
    shared_bytes: int
    array_bytes: int


def outside(recorded: Recorded, missed: Sequence[Observation]) -> Outside:
    """Return how much of what a run used is not the allocator's.

    Args:
        recorded: what the meter and the observer saw.
        missed: the observations that fall on none of the allocator's blocks.
    """
    maps = lives(recorded.readings.mapped)
    arrays = lives(recorded.readings.arrays)
    unseen = {(observation.time, observation.address) for observation in missed}
    shared: dict[int, Block] = {}
    has_files = False
    others: list[Block] = []
    for use in recorded.uses:
        holding = [block for block in maps if _lies_in(use, block)]
        if use.shared:
            shared.update((block.born, block) for block in holding)
        has_files |= bool(holding) and not use.shared
        if holding or (use.seen, use.address) not in unseen:
            continue
        if not any(_was_in(use, block) for block in arrays):
            others.append(Block(use.bytes, use.address, use.seen, use.gone))
    if shared and not has_files:
        # Then the other maps, which no module was given, are the workers' as well: their targets.
        shared.update((block.born, block) for block in maps)
    others += arrays
    ledgers = [Ledger(blocks) for blocks in (maps + others, others, list(shared.values()), arrays)]
    return Outside(*(ledger.peak_bytes for ledger in ledgers))


def _lies_in(use: Use, block: Block) -> bool:
    return block.address <= use.address < block.address + block.bytes


def _was_in(use: Use, block: Block) -> bool:
    """The same when it was seen: by now, another may have that place."""
    alive = block.born <= use.seen and (block.died is None or block.died > use.seen)
    return alive and _lies_in(use, block)
