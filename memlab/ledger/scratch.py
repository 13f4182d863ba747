"""An operator's scratch: what it takes for itself, and gives back before it is done."""

from __future__ import annotations

from memlab.ledger.blocks import Block
from memlab.ledger.spans import Spans

#: Operators that do nothing but hand out memory, filled or not: who called them has asked for it.
ALLOCATORS = {
    f"aten::{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"),
        *("full", "full_like", "new_full", "resize_", "resize_as_"),
    )
}


def tell_scratch(blocks: list[Block], spans: Spans) -> None:
    """Mark the blocks that an operator took for itself: they come back before the operator that
    asked for them is over.

    Who asked is the innermost operator that does more than hand out memory. What an operator called
    by another one makes is a tensor: it outlives the operator that made it, if not the caller.
    Autograd's nodes and functions written in Python are no operators here.
    """
    operators = Spans(span for span in spans.of("operator") if _computes(span.name))
    for block in blocks:
        asked = operators.at(block.born)
        block.scratch = asked is not None and block.died is not None and block.died <= asked.end


def is_operator(name: str) -> bool:
    """Whether it is an operator of the dispatcher: not a node of autograd, nor a function."""
    return "::" in name and not name.startswith("torch::autograd::")


def _computes(name: str) -> bool:
    return is_operator(name) and name not in ALLOCATORS
