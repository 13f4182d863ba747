"""The allocator's blocks, each with its life."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memlab.ledger.spans import FOREVER

#: The columns of the ledger, in the order in which every table and figure shows them.
COLUMNS = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "batch",
    "kept",
    "temporaries",
    "unattributed",
)


#: Data types as the field writes them; the others go by PyTorch's name.
_TYPES = {"float64": "FP64", "float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


def format_type(dtype: str | None, shape: tuple[int, ...] | None = None) -> str:
    """Write a tensor's data type and shape for people: `FP32 (64, 8000)`. None was not seen.

    Args:
        dtype: PyTorch's name of it without `torch.`: `"float32"`.
        shape: the tensor's.
    """
    if dtype is None:
        return "type not seen"
    name = _TYPES.get(dtype, dtype)
    return name if shape is None else f"{name} {tuple(shape)}"


class Event(NamedTuple):
    """The allocator handed out `bytes` at `address` (positive), or took them back (negative). Time
    in nanoseconds.
    """

    time: int
    address: int
    bytes: int


@dataclass(slots=True)
class Block:
    """One allocation: its size, its life (nanoseconds; `died` is None if it outlived the record),
    what it was for.

    `scratch`: an operator took it for itself and gave it back before it was done. How much that is
    depends on the processor and on the number of threads.
    `operator`: the outermost one, `aten::conv2d` and not the `aten::empty` that it calls.
    `dtype`, `shape`: of a tensor that was seen to fill the block (None: no such tensor was seen).
    `model`, `role`: the outermost module that holds a parameter or a buffer, and which of the three
    it is: trained, frozen or a buffer.
    `kept_from`: the step that it was made for is over, and something still holds it: from this
    moment on it counts as kept, and not in its column (nanoseconds; None: it does not).
    `line`: the line of the user's code that made it, if lines were noted: `train.py:12`.
    """

    bytes: int
    address: int
    born: int
    died: int | None = None
    column: str = "unattributed"
    phase: str = "other"
    module: str = ""
    operator: str = ""
    name: str = ""
    scratch: bool = False
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    model: str = ""
    role: str = ""
    kept_from: int | None = None
    line: str = ""

    @property
    def is_known(self) -> bool:
        """Whether it counts in a comparison to the byte: it is no scratch, and was explained."""
        return not self.scratch and self.column != "unattributed"

    def column_at(self, time: int) -> str:
        """The column in which it counts at a moment (nanoseconds)."""
        if self.kept_from is not None and time >= self.kept_from:
            return "kept"
        return self.column

    def __str__(self) -> str:
        kind = format_type(self.dtype, self.shape)
        where = f"{self.module or self.name:<24}  {self.line}"
        size = f"{self.bytes / 2**20:>10,.2f} MiB"
        return f"{size}  {self.column:<16}{kind:<22}  {self.operator:<30}  {where}".rstrip()


def lives(events: Iterable[Event], alive: Sequence[Block] = ()) -> list[Block]:
    """The blocks of some events: every hand-out paired with its return."""
    blocks = list(alive)
    at: dict[int, Block] = {block.address: block for block in blocks}
    last = -FOREVER
    for time, address, size in events:
        # The allocator's order is exact, its clock may be coarse: moments are kept apart so that no
        # two events share one.
        last = time = max(time, last + 1)
        known = at.pop(address, None)
        if size > 0:
            if known is not None and known.died is None:
                # The address is handed out again, so the old block has come back without a word
                # (another thread).
                known.died = time
            at[address] = block = Block(size, address, time)
            blocks.append(block)
        elif known is not None and known.died is None:
            known.died = time
        # A return of an address that was never handed out here is a block of before the run. It is
        # not ours to count.
    return blocks
