"""The buckets of `DistributedDataParallel`: as large as all gradients, and held by C++ alone."""

from __future__ import annotations

from collections.abc import Iterable

from memlab.ledger.blocks import Block
from memlab.ledger.observations import PRIORITY
from memlab.ledger.scratch import ALLOCATORS
from memlab.ledger.spans import FOREVER, Spans

#: The name of a bucket.
BUCKET = "bucket of DistributedDataParallel"

# What makes one tensor of many, to be sent to the other ranks: weights and buffers, before they are
# used.
_SENDS = "aten::flatten_dense_tensors"


def tell_buckets(blocks: Iterable[Block], from_before: Iterable[Block], spans: Spans) -> None:
    """Mark the buckets: asked for by the reducer itself, there when it is done, and seen by nobody,
    or as gradients that are views of them.

    Args:
        blocks: all blocks, with what was seen of them.
        from_before: what was alive at the start. Buckets among it end where new ones are made,
            which happens once in the life of a wrapper.
        spans: what ran.
    """
    reducers = spans.of("reducer")
    for block in blocks:
        made_in = reducers.at(block.born)
        if made_in is None:
            continue
        if block.died is None and block.operator == _SENDS:
            # A thread of the process group may free it, where a CPU's meter sees nothing.
            block.died = made_in.end
        if block.operator not in ALLOCATORS or (block.died or FOREVER) <= made_in.end:
            continue
        if block.column in PRIORITY and block.column != "gradients":
            continue
        block.column, block.name = "gradients", BUCKET
        for old in from_before:
            if old.name == BUCKET and old.died is None:
                old.died = block.born
