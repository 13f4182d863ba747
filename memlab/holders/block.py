"""Who holds a block of a ledger now, after it was recorded."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from memlab.holders.find import Holder, find_holders
from memlab.ledger import Block


def holders_of_block(
    block: Block, left: Mapping[int, weakref.ref], device: str, limit: int
) -> list[Holder]:
    """Who holds a block now; `Measurement.holders_of` says the rest.

    Args:
        block: one that was recorded.
        left: the storages that Python held when the recording ended, by address.
        device: where the block is.
        limit: how many holders are returned at most.

    Raises:
        ValueError: it is no block, or it is gone.
    """
    if not isinstance(block, Block):
        raise ValueError(
            "holders_of() takes a block of this measurement, of `largest()` or `ledger.blocks`, not"
            f" {type(block).__name__} {block!r:.60}"
        )
    what = f"nobody holds this block of {block.bytes:,} bytes"
    if block.died is not None:
        raise ValueError(
            f"{what}: it was freed while it was measured, as `measure` frees all that its run made."
            " Ask for a block that is left at the end of a `watch` (its `died` is None)."
        )
    storage = left.get(block.address)
    if storage is not None and storage() is None:
        raise ValueError(f"{what} any more: it was freed after it was measured.")
    found = find_holders([block.address], device=device, limit=limit)
    if storage is None:
        # No tensor of Python held it then: one that is there now has come to its place.
        found = [holder for holder in found if holder.kind == "graph"]
        if not found:
            raise ValueError(
                f"{what} that could be found: it was freed after it was measured, or C++ alone"
                " holds it."
            )
    return found
