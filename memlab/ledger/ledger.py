"""What was alive at which moment: the ledger, and its columns over time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from memlab.ledger.blocks import COLUMNS, Block
from memlab.ledger.spans import Span, Spans


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

    `built` is the moment at which the first step began (nanoseconds; None: no step is known).

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
    built: int | None = None

    def __post_init__(self) -> None:
        changes = []  # (moment, signed bytes, which block, its column, whether it only moves)
        for index, block in enumerate(self.blocks):
            changes.append((block.born, block.bytes, index, block.column, False))
            last_column = block.column
            if block.kept_from is not None:
                last_column = "kept"
                changes.append((block.kept_from, -block.bytes, index, block.column, True))
                changes.append((block.kept_from, block.bytes, index, "kept", False))
            if block.died is not None:
                changes.append((block.died, -block.bytes, index, last_column, False))
        changes.sort(key=lambda change: (change[0], change[1]))

        self._times = np.array([change[0] for change in changes], dtype=np.int64)
        self._changes = np.array([change[1] for change in changes], dtype=np.int64)
        self._owners = np.array([change[2] for change in changes], dtype=np.int64)
        numbers = [COLUMNS.index(change[3]) for change in changes]
        self._columns = np.array(numbers, dtype=np.int64)
        self._moves = np.array([change[4] for change in changes], dtype=bool)
        self._total = np.cumsum(self._changes)
        self._phases = Spans(self.phases)

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
        until = int(curve.argmax()) + 1 if len(curve) else 0
        columns = {}
        for number, name in enumerate(COLUMNS):
            columns[name] = int(changes[:until][self._columns[:until] == number].sum())
        return columns

    def phase_at(self, time: int) -> str:
        """The phase at a moment (nanoseconds): forward, backward, optimizer, other, or building
        before the first step.
        """
        phase = self._phases.at(time)
        if phase is None:
            return "building" if self.built is not None and time < self.built else "other"
        return phase.kind

    def highest(self, start: int, end: int) -> tuple[int, int]:
        """The most bytes alive at once from one moment to another (nanoseconds), and when."""
        first, last = np.searchsorted(self._times, [start, end])
        before = int(self._total[first - 1]) if first else 0
        if last <= first or self._total[first:last].max() <= before:
            return before, start
        index = int(first + self._total[first:last].argmax())
        return int(self._total[index]), int(self._times[index])

    def alive_at(self, time: int) -> list[Block]:
        """The blocks alive at a moment (nanoseconds), largest first, each with its column of that
        moment.
        """
        alive = [b for b in self.blocks if b.born <= time and (b.died is None or b.died > time)]
        then = [dataclasses.replace(block, column=block.column_at(time)) for block in alive]
        return sorted(then, key=lambda block: -block.bytes)

    def columns_at(self, time: int) -> dict[str, int]:
        """Bytes by column at a moment (nanoseconds)."""
        columns = dict.fromkeys(COLUMNS, 0)
        for block in self.alive_at(time):
            columns[block.column] += block.bytes
        return columns

    def timeline(self) -> Timeline:
        """Bytes by column over time."""
        # A block that goes from its column to what is kept is there all the time.
        shown = ~self._moves
        times = self._times[shown]
        columns = {
            name: np.cumsum(np.where(self._columns == number, self._changes, 0))[shown]
            for number, name in enumerate(COLUMNS)
        }
        phase = np.array([self.phase_at(int(time)) for time in times], dtype=object)
        return Timeline((times - self.start) / 1e9, columns, self._total[shown], phase)
