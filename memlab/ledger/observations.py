"""What was seen of a block at one moment, and which of several sightings counts."""

from __future__ import annotations

from typing import NamedTuple

from memlab.ledger.blocks import Block
from memlab.ledger.spans import FOREVER, Spans

#: When one block was seen as several things, the first of these wins: a weight that autograd saved
#: is a parameter.
PRIORITY = {
    "parameters": 0,
    "optimizer_state": 1,
    "gradients": 2,
    "batch": 3,
    "kept": 4,
    "activations": 5,
}

#: The name of a batch that a data loader returned.
FROM_LOADER = "from a data loader"


class Observation(NamedTuple):
    """At `time`, the block at `address` was seen to be `column`; `name` says which (a parameter's
    name, say).

    `column` is empty where only the type was seen, and "unattributed" where only this is known,
    that Python held it. `dtype` is that of the tensor that was seen, and
    `shape` its shape if it fills the block (None: it is a view of a part). `model` is the outermost
    module that holds it, `role` what it is there: `"trained"`, `"frozen"` or `"buffer"`.
    """

    time: int
    address: int
    column: str
    name: str = ""
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    model: str = ""
    role: str = ""


def rank_of(seen: Observation) -> float:
    """How strong what was seen is: the smaller, the stronger."""
    if seen.role == "buffer":
        # What an optimizer holds is its state, also where a module has it as a buffer: so it is
        # with the module that `torch.compile(optimizer.step)` makes.
        return PRIORITY["optimizer_state"] + 0.5
    return PRIORITY.get(seen.column, len(PRIORITY))


def note_type(block: Block, seen: Observation, best: dict[int, float]) -> None:
    """Note the type that was seen in a block: that of the strongest label, the first of several.

    A tensor that fills the block has its shape. Of views of parts only the data type is taken, as
    long as all of them agree.
    """
    if seen.dtype is None:
        return
    if seen.shape is not None:
        rank = rank_of(seen)
        if rank < best.get(id(block), FOREVER):
            best[id(block)] = rank
            block.dtype = seen.dtype
            block.shape = seen.shape
    elif block.shape is None:
        block.dtype = seen.dtype if block.dtype in (None, seen.dtype) else "mixed"


def was_there(block: Block, seen: Observation, phases: Spans) -> bool:
    """Whether a block was there before the model ran that was given it; else it is an activation.

    What a data loader returned is the batch at any time. So is what a step makes outside its
    modules and a later forward is given: the next batch, fetched before the backward.
    """
    if block.phase == "other" or seen.name == FROM_LOADER:
        return True
    given = phases.at(seen.time)
    if seen.column != "batch" or block.module or given is None:
        return False
    return given.kind == "forward" and given != phases.at(block.born)
