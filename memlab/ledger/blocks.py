"""The allocator's blocks, each with its life, and what was alive at which moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from memlab.ledger.spans import FOREVER, Span, Spans

#: The columns of the ledger, in the order in which every table and figure shows them.
COLUMNS = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "batch",
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

    @property
    def is_known(self) -> bool:
        """Whether it counts in a comparison to the byte: it is no scratch, and was explained."""
        return not self.scratch and self.column != "unattributed"

    def __str__(self) -> str:
        kind = format_type(self.dtype, self.shape)
        where = self.module or self.name
        size = f"{self.bytes / 2**20:>10,.2f} MiB"
        return f"{size}  {self.column:<16}{kind:<22}  {self.operator:<30}  {where}".rstrip()


@dataclass
class Timeline:
    """Bytes alive after each event: `seconds` since the start, `bytes[column]`, `total`, `phase`,
    all of one length.
    """

    seconds: np.ndarray
    bytes: dict[str, np.ndarray]
    total: np.ndarray
    phase: np.ndarray

    def thin(self, points: int = 1000) -> Timeline:
        """The same curve with at most about `points` moments, each the highest of its stretch: the
        peak stays.
        """
        count = len(self.total)
        if count <= points:
            return self
        edges = np.linspace(0, count, points + 1).astype(int)
        stretches = zip(edges[:-1], edges[1:], strict=True)
        keep = np.array([low + int(self.total[low:high].argmax()) for low, high in stretches])
        columns = {name: values[keep] for name, values in self.bytes.items()}
        return Timeline(self.seconds[keep], columns, self.total[keep], self.phase[keep])


@dataclass
class Ledger:
    """Every block that lived during a run, by column, with the phases of the run.

    `modules` are those that ran, by name, and `recomputed` those of them that ran in a backward
    again. `recomputations` says how often a stretch of forward ran again there.
    """

    blocks: list[Block]
    phases: list[Span] = field(default_factory=list)
    start: int = 0
    end: int = 0
    modules: frozenset[str] = frozenset()
    recomputed: frozenset[str] = frozenset()
    recomputations: int = 0

    def __post_init__(self) -> None:
        changes = []  # (moment, signed bytes, which block)
        for index, block in enumerate(self.blocks):
            changes.append((block.born, block.bytes, index))
            if block.died is not None:
                changes.append((block.died, -block.bytes, index))
        changes.sort(key=lambda change: (change[0], change[1]))

        self._times = np.array([change[0] for change in changes], dtype=np.int64)
        self._changes = np.array([change[1] for change in changes], dtype=np.int64)
        self._owners = np.array([change[2] for change in changes], dtype=np.int64)
        self._total = np.cumsum(self._changes)

        # The same without what is in no tensor: an operator's scratch, and what nobody knows.
        is_known = [block.is_known for block in self.blocks]
        of_known = np.array(is_known, dtype=bool)[self._owners]
        self._known_changes = np.where(of_known, self._changes, 0)
        self._known = np.cumsum(self._known_changes)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at once."""
        return int(self._total.max()) if len(self._total) else 0

    @property
    def peak_time(self) -> int:
        """The moment (nanoseconds) at which the peak was first reached."""
        return int(self._times[self._total.argmax()]) if len(self._total) else self.start

    @property
    def peak_phase(self) -> str:
        """The phase in which the peak was reached."""
        return self.phase_at(self.peak_time)

    def peak_columns(self) -> dict[str, int]:
        """Bytes by column at the peak; their sum is `peak_bytes`."""
        return self._columns_at_highest(self._total, self._changes)

    @property
    def known_peak_bytes(self) -> int:
        """The most bytes alive at once without operators' scratch and what is unattributed.

        It may be reached at another moment than the peak.
        """
        return int(self._known.max()) if len(self._known) else 0

    @property
    def known_peak_time(self) -> int:
        """The moment (nanoseconds) at which that was first reached."""
        return int(self._times[self._known.argmax()]) if len(self._known) else self.start

    def known_columns(self) -> dict[str, int]:
        """Bytes by column at that moment, without the same; their sum is `known_peak_bytes`."""
        return self._columns_at_highest(self._known, self._known_changes)

    def _columns_at_highest(self, curve: np.ndarray, changes: np.ndarray) -> dict[str, int]:
        columns = dict.fromkeys(COLUMNS, 0)
        if len(curve):
            until = int(curve.argmax()) + 1
            for change, owner in zip(changes[:until], self._owners[:until], strict=True):
                columns[self.blocks[owner].column] += int(change)
        return columns

    def phase_at(self, time: int) -> str:
        """The phase at a moment (nanoseconds): forward, backward, optimizer or other."""
        phase = Spans(self.phases).at(time)
        return phase.kind if phase else "other"

    def alive_at(self, time: int) -> list[Block]:
        """The blocks alive at a moment (nanoseconds), largest first."""
        alive = [b for b in self.blocks if b.born <= time and (b.died is None or b.died > time)]
        return sorted(alive, key=lambda block: -block.bytes)

    def columns_at(self, time: int) -> dict[str, int]:
        """Bytes by column at a moment (nanoseconds)."""
        columns = dict.fromkeys(COLUMNS, 0)
        for block in self.alive_at(time):
            columns[block.column] += block.bytes
        return columns

    def timeline(self) -> Timeline:
        """Bytes by column over time."""
        names = [block.column for block in self.blocks]
        of = np.array([COLUMNS.index(names[owner]) for owner in self._owners], dtype=np.int64)
        columns = {
            name: np.cumsum(np.where(of == number, self._changes, 0))
            for number, name in enumerate(COLUMNS)
        }
        phases = Spans(self.phases)
        found = [phases.at(int(time)) for time in self._times]
        phase = np.array([span.kind if span else "other" for span in found], dtype=object)
        return Timeline((self._times - self.start) / 1e9, columns, self._total, phase)


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
