"""The allocator's state as plain data, for drawings and tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memlab.meters.allocator.blocks import Block


@dataclass(frozen=True)
class BlockInfo:
    """A block; `state` is `active_allocated`, `active_pending_free` (freed, but another stream may
    still use it) or `inactive`, as in `torch.cuda.memory_snapshot`.
    """

    address: int
    size: int
    state: str


@dataclass(frozen=True)
class SegmentInfo:
    """What the driver gave in one piece and its blocks, which fill it. Of an expandable segment, a
    range of mapped pages.
    """

    address: int
    size: int
    stream: int
    pool: str  # "small" or "large", as torch.cuda.memory_snapshot's segment_type
    expandable: bool
    blocks: tuple[BlockInfo, ...]


def segments_of(heads: Iterable[Block]) -> list[SegmentInfo]:
    """The segments by address.

    Args:
        heads: the first block of each segment.
    """
    segments = []
    for head in heads:
        blocks: list[BlockInfo] = []
        block: Block | None = head
        while block is not None:
            if block.mapped:
                blocks.append(BlockInfo(block.address, block.size, _state(block)))
            following = block.following
            if blocks and (following is None or not following.mapped):
                segments.append(
                    SegmentInfo(
                        blocks[0].address,
                        sum(info.size for info in blocks),
                        head.stream,
                        "small" if head.pool.small else "large",
                        head.expandable is not None,
                        tuple(blocks),
                    )
                )
                blocks = []
            block = following
    return sorted(segments, key=lambda segment: segment.address)


def _state(block: Block) -> str:
    if block.allocated:
        return "active_allocated"
    return "active_pending_free" if block.pending else "inactive"
