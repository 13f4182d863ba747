"""The buckets of `DistributedDataParallel`: as large as all gradients, and held by C++ alone."""

from __future__ import annotations

from collections.abc import Iterable

from memlab.ledger.blocks import Block
from memlab.ledger.observations import PRIORITY
from memlab.ledger.scratch import ALLOCATORS
from memlab.ledger.spans import FOREVER, Span, Spans

#: The name of a bucket.
BUCKET = "bucket of DistributedDataParallel"

# A GPU's allocator rounds a block up to a multiple of this.
ROUNDED_TO = 512

# What makes one tensor of many, to be sent to the other ranks: weights and buffers, before they are
# used.
_SENDS = "aten::flatten_dense_tensors"


def tell_buckets(blocks: Iterable[Block], from_before: Iterable[Block], spans: Spans) -> None:
    """Mark the buckets: asked for by the reducer itself, there when it is done, and seen by nobody,
    or as gradients that are views of them.

    Args:
        blocks: all blocks, with what was seen of them.
        from_before: what was alive at the start. Buckets among it end where new ones are made,
            which happens once in the life of a wrapper; those of another wrapper stay.
        spans: what ran.
    """
    reducers = spans.of("reducer")
    made: dict[Span, list[Block]] = {}
    for block in blocks:
        made_in = reducers.at(block.born)
        if made_in is None:
            continue
        if block.operator == _SENDS:
            # A thread of the process group may free it, where a CPU's meter sees nothing until the
            # address is handed out again.
            block.died = min(block.died or FOREVER, made_in.end)
        if block.operator not in ALLOCATORS or (block.died or FOREVER) <= made_in.end:
            continue
        if block.column in PRIORITY and block.column != "gradients":
            continue
        block.column, block.name = "gradients", BUCKET
        made.setdefault(made_in, []).append(block)
    for new in made.values():
        _end_old(from_before, new)


def _end_old(from_before: Iterable[Block], new: list[Block]) -> None:
    """End the buckets whose place others took: as many bytes, of the same gradients."""
    size = sum(block.bytes for block in new)
    rounded = ROUNDED_TO * len(new)
    for old in from_before:
        if old.name == BUCKET and old.died is None and 0 <= size - old.bytes < rounded:
            old.died = new[0].born
            return
