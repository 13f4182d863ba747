"""What was measured, and its words: `Measurement`, made of what a recording saw."""

from __future__ import annotations

import html
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from memlab import breakdown
from memlab.forms import Machine
from memlab.growth import Growth
from memlab.holders import Holder, holders_of_block
from memlab.ledger import (
    COLUMNS,
    Block,
    Ledger,
    Step,
    Timeline,
    activations_at_backward,
)
from memlab.meters.gradients import Missing
from memlab.notes import notes_on_outside, notes_on_steps
from memlab.receipt import Receipt, Said, groups, name_largest, step_peaks
from memlab.show import Table
from memlab.small_plot import small_plot
from memlab.timing import Seconds
from memlab.units import format_bytes
from memlab.verdict import Verdict, verdict_of, with_peak


@dataclass
class Measurement:
    """What a run needed: the peak in bytes, what the bytes were for, and when.

    Attributes:
        peak_bytes: the most bytes allocated at once during the run. Exact on the CPU; on CUDA the
            allocator's counter, less `workspace_bytes`.
        columns: bytes by column at the moment of the peak; they sum to `peak_bytes`.
        phase: the phase that held the peak: forward, backward, optimizer, building or other.
        reserved_bytes: the most that the allocator held from the driver, whole process (CPU: None).
        device_bytes: what the driver says is in use on the whole device at the end (CPU: None).
        bytes_after_step: bytes alive after each step. In a loop that leaks they grow. (Empty where
            a step was not recorded in full.)
        steps: what each step needed and left. `watch` records some of a long loop's steps in full.
        growth: what each step leaves behind, and nobody owns.
        holders: who held it when the run was over (`holders_of` says who holds a block now).
        seconds: median and spread of one step, from separate runs with nothing switched on (None:
            not asked for).
        losses: what each step returned: numbers, or tensors with one element (else None).
        outside_bytes: the most bytes at once of tensors that the run used and this device's
            allocator did not hand out during it, as far as they were seen: memory maps, shared
            memory (a data loader's workers), NumPy arrays, what other threads made. Not counted in
            anything above.
        outside_memory_bytes: the same without the memory maps: files and shared memory.
        outside_shared_bytes: the shared memory alone: what a data loader's workers send.
        outside_array_bytes: NumPy's arrays alone, given to a module or not (on the CPU).
        never_called: the modules whose forward was replaced, as a technique does it, and that were
            never called.
        evaluating: whether all modules were in eval() mode.
        without_gradient: parameters that need a gradient and got none (None: all or none got one).
        workspace_bytes: what cuBLAS held for itself, as it does for every model (None on the CPU).
            Reserved, not in the peak.
        environment: device, GPU, torch, driver, Python.
        ledger: every block with its life (`memlab.ledger.Ledger`).
        left: the storages that were there at its end, by address (`watch`).
    """

    peak_bytes: int
    columns: dict[str, int]
    phase: str
    ledger: Ledger
    environment: dict[str, object]
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    bytes_after_step: tuple[int, ...] = ()
    seconds: Seconds | None = None
    losses: tuple[float, ...] | None = None
    outside_bytes: int = 0
    outside_memory_bytes: int = 0
    outside_shared_bytes: int = 0
    outside_array_bytes: int = 0
    never_called: tuple[str, ...] = ()
    evaluating: bool = False
    without_gradient: Missing | None = None
    workspace_bytes: int | None = None
    steps: tuple[Step, ...] = ()
    growth: tuple[Growth, ...] = ()
    holders: tuple[Holder, ...] = ()
    left: dict[int, weakref.ref] = field(default_factory=dict, repr=False, compare=False)
    _timeline: Timeline | None = field(default=None, repr=False, compare=False)

    @property
    def is_predicted(self) -> bool:
        """Whether nothing was measured: it is a prediction."""
        return False

    @property
    def timeline(self) -> Timeline:
        """Bytes by column over time."""
        if self._timeline is None:
            self._timeline = self.ledger.timeline()
        return self._timeline

    @property
    def known_bytes(self) -> int:
        """The most bytes at once without what is in no tensor: to compare two runs to the byte.

        Left out is what operators took for themselves and gave back before they were done: how much
        that is depends on the processor and on the number of threads. (On CUDA it is counted: the
        history's clock does not tell it apart.) Left out is also what stayed unattributed: a GPU's
        allocator gives out blocks that are up to 1 MiB too large when it has one at hand, and
        whether it has depends on what went before. So two equal runs have equal known bytes.
        """
        return sum(self.known_columns.values())

    @property
    def known_columns(self) -> dict[str, int]:
        """Bytes by column at the moment of `known_bytes`; they sum to it."""
        if not self.ledger.blocks:  # a history that was too long to be kept
            return {**self.columns, "unattributed": 0}
        return self.ledger.known_columns()

    @property
    def activations_at_backward(self) -> int | None:
        """The activations that are there when backward begins, in bytes; of several backwards, the
        most. None where no backward was recorded.

        It is what a forward leaves, wherever the peak lies.
        """
        return activations_at_backward(self.ledger)

    @property
    def building_peak_bytes(self) -> int | None:
        """The most bytes before the first step; None where no step is known."""
        ledger = self.ledger
        if ledger.built is None or not ledger.blocks:
            return None
        return ledger.highest(ledger.start, ledger.built)[0]

    @property
    def verdict(self) -> Verdict:
        """What the steps say: steady, growing, or as large as the longest batch."""
        verdict = verdict_of(self.steps, self.growth, self.building_peak_bytes, self.holders)
        return with_peak(verdict, self.steps, self.peak_bytes, self.ledger.peak_time)

    def largest(self, count: int = 10) -> list[Block]:
        """The largest blocks alive at the peak: what they are, and who made them where."""
        return self.ledger.alive_at(self.ledger.peak_time)[:count]

    def groups(self, count: int = 10, at: int | None = None) -> breakdown.Groups:
        """The largest groups of equal blocks at the peak, or `at` a moment; a table in print."""
        return breakdown.largest_groups(self.ledger, count, at)

    def by_dtype(self, at: int | None = None) -> breakdown.Breakdown:
        """Bytes by column and data type, as far as a tensor was seen in a block; `at` as above."""
        columns = self.columns if at is None else self.ledger.columns_at(at)
        return breakdown.split_by_dtype(self.ledger, columns, at)

    def by_model(self, at: int | None = None) -> breakdown.Breakdown:
        """Parameters by model, trained and frozen apart, and buffers; `at` as above."""
        return breakdown.split_by_model(self.ledger, at)

    def holders_of(self, block: Block, limit: int = 10) -> list[Holder]:
        """Who holds a block now, and the line that lets go of it; the user's own code first.

        Args:
            block: one that is left when a `watch` ends (its `died` is None).
            limit: how many holders are returned at most.

        Raises:
            ValueError: it is no block, or it is gone; the message says since when.
        """
        return holders_of_block(block, self.left, str(self.environment["device"]), limit)

    def receipt(self) -> Receipt:
        """What is worth keeping of this measurement: to compare a later one with."""
        ledger = self.ledger
        known = [block for block in ledger.alive_at(ledger.known_peak_time) if block.is_known]
        named, others = name_largest(groups(known, ledger.known_peak_time))
        return Receipt(
            environment=Machine(**self.environment),
            peak_bytes=self.peak_bytes,
            phase=self.phase,
            columns=self.columns,
            known_bytes=self.known_bytes,
            known_columns=self.known_columns,
            blocks=named,
            other_blocks_bytes=others,
            outside_bytes=self.outside_bytes,
            building_peak_bytes=self.building_peak_bytes,
            step_count=len(self.steps),
            steps=step_peaks(self.steps),
            verdict=Said(
                kind=self.verdict.kind,
                sentence=self.verdict.sentence,
                bytes_a_step=self.verdict.bytes_a_step,
            ),
            holders=[str(holder) for holder in self.holders],
        )

    def save(self, path: str | Path) -> None:
        """Write the receipt to a file: `memlab.receipt` reads it and compares."""
        self.receipt().save(path)

    def _table(self) -> Table:
        return breakdown.tabulate_columns(self.columns, self.peak_bytes)

    def _notes(self) -> list[str]:
        notes = []
        if self.reserved_bytes is not None:
            notes.append(
                f"allocated {format_bytes(self.peak_bytes)} · reserved"
                f" {format_bytes(self.reserved_bytes)} · device {format_bytes(self.device_bytes)}"
            )
        if self.workspace_bytes:
            notes.append(
                f"not counted: {format_bytes(self.workspace_bytes)} of workspaces that cuBLAS"
                " keeps, whatever the model"
            )
        if self.seconds is not None:
            notes.append(f"{self.seconds} a step")
        if self.losses:
            notes.append(f"loss {self.losses[0]:.4f} → {self.losses[-1]:.4f}")
        notes += notes_on_outside(self.outside_bytes, self.outside_array_bytes)
        if self.without_gradient is not None:
            notes.append(str(self.without_gradient))
        return notes + notes_on_steps(self.steps, self.verdict.kind)

    def _headline(self) -> str:
        size = f"{format_bytes(self.peak_bytes)} ({self.peak_bytes:,} bytes)"
        return f"Peak {size}, in {self.phase}, on {self.environment.get('gpu') or 'cpu'}"

    def __str__(self) -> str:
        lines = [
            *self._table().to_text(headings=False).splitlines(),
            *self._notes(),
        ]
        verdict = [self.verdict.sentence] if len(self.steps) > 1 else []
        return "\n".join(["\n  ".join([self._headline(), *lines]), *verdict])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self._notes())
        verdict = ""
        if len(self.steps) > 1:
            verdict = f"<div>{html.escape(self.verdict.sentence)}</div>"
        headline = f"<div><b>{html.escape(self._headline())}</b></div>"
        return f"{headline}{self._table().to_html()}{notes}{verdict}{small_plot(self.steps)}"
