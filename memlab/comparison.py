"""Measurements side by side, with what was predicted and what is left over."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from memlab.changes import change_in_words, went_elsewhere
from memlab.ledger import COLUMNS
from memlab.measurement import Measurement
from memlab.show import Table
from memlab.units import MiB, format_bytes, residual, times_less, times_time

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Variant:
    """One side of a comparison: its name, its measurement, and the peak that was predicted for it
    (bytes) or None.
    """

    name: str
    measurement: Measurement
    predicted_bytes: int | None = None

    @property
    def residual(self) -> float | None:
        """What the prediction missed, as a part of it, or None if nothing was predicted.

        What is held against it are the measurement's known bytes: no formula says what an operator
        takes for itself, which is another amount on another processor.
        """
        # (Nothing is known where a GPU's history was too long to be kept.)
        measured = self.measurement.known_bytes or self.measurement.peak_bytes
        return residual(measured, self.predicted_bytes)


@dataclass
class Comparison:
    """Measurements side by side. The first is the baseline; the last is where the
    techniques led.
    """

    variants: list[Variant]

    @property
    def ratio(self) -> float:
        """How many times smaller the last peak is than the first (below 1: it grew)."""
        return self.variants[0].measurement.peak_bytes / self.variants[-1].measurement.peak_bytes

    @property
    def residuals(self) -> dict[str, float | None]:
        """What the prediction missed, in % of the prediction, by variant."""
        return {v.name: None if v.residual is None else 100 * v.residual for v in self.variants}

    def change(self) -> dict[str, int]:
        """By how many bytes each column at the peak changed from the first to the last (negative:
        it fell).
        """
        before, after = self.variants[0].measurement.columns, self.variants[-1].measurement.columns
        return {column: after[column] - before[column] for column in COLUMNS}

    @property
    def verdict(self) -> str:
        """What happened, in one line (`memlab.changes`)."""
        first, last = self.variants[0].measurement, self.variants[-1].measurement
        if len(self.variants) == 1:
            predicted, residual = self.variants[0].predicted_bytes, self.variants[0].residual
            beside = (
                ""
                if predicted is None
                else f", predicted {format_bytes(predicted)} ({100 * residual:+.2f} %)"
            )
            return f"Peak {format_bytes(first.peak_bytes)}{beside}"
        words = change_in_words(first, last)
        return f"{words} (predicted)" if first.is_predicted or last.is_predicted else words

    def within(self, percent: float) -> None:
        """Hold every prediction against what was measured, and fail where one is too far off.

        What counts is what is in tensors (`Variant.residual`).

        Args:
            percent: the most that a measurement may be off, in % of its prediction.

        Raises:
            AssertionError: a prediction is further off; the message says which, and by how much.
        """
        for variant in self.variants:
            missed = variant.residual
            if missed is not None and abs(100 * missed) > percent:
                raise AssertionError(
                    f"{variant.name}: predicted {format_bytes(variant.predicted_bytes)}, measured"
                    f" {format_bytes(variant.measurement.known_bytes)} in tensors:"
                    f" {100 * missed:+.2f} %, and {percent:g} % are allowed"
                )

    def to_frame(self) -> pd.DataFrame:
        """Return one row a variant, sizes in MiB.

        "In tensors" are the measurement's known bytes, which the residual is about. They are shown
        where they are not the whole peak. "Activations at backward" are those that are there when a
        backward begins, wherever the peak lies, and "outside" is what was used and this allocator
        did not hand out. Columns in which no variant has a value are left out.
        """
        first = self.variants[0].measurement
        frame = pd.DataFrame.from_dict(
            {variant.name: _row(variant, first) for variant in self.variants}, orient="index"
        )
        if any(variant.measurement.is_predicted for variant in self.variants):
            frame = frame.rename(columns={"measured MiB": "peak MiB"})
        if all(v.measurement.known_bytes == v.measurement.peak_bytes for v in self.variants):
            frame = frame.drop(columns="in tensors MiB")
        if len(self.variants) == 1:
            frame = frame.drop(columns=["× less", "× time"])
        # A column of the ledger that is 0 everywhere, or a value that this device does not have,
        # says nothing.
        empty = [name for name in frame if frame[name].isna().all()]
        zero = [name for name in (*_LEDGER_HEADINGS, "outside MiB") if not frame[name].any()]
        return frame.drop(columns=[*empty, *zero])

    def plot(self, title: str | None = None) -> Figure:
        """The ledgers on one axis, the predictions as marks, and the timelines below. The title
        says what happened.
        """
        from memlab import figures  # here, so that a comparison can be made where nothing is drawn

        measurements = {variant.name: variant.measurement for variant in self.variants}
        predicted = {variant.name: variant.predicted_bytes for variant in self.variants}
        return figures.comparison(measurements, title or self.verdict, predicted)

    def _table(self) -> Table:
        rows = []
        for heading, values in self.to_frame().items():
            form = _FORMATS.get(heading, "{:,.2f}")
            row = {"": heading}
            for name, value in values.items():
                row[name] = "-" if pd.isna(value) else form.format(value)
            rows.append(row)
        return Table(rows, numbers={variant.name for variant in self.variants})

    def __str__(self) -> str:
        return f"{self._table().to_text()}\n{self.verdict}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"{self._table().to_html()}<div><b>{html.escape(self.verdict)}</b></div>"


_LEDGER_HEADINGS = [f"{column.replace('_', ' ')} MiB" for column in COLUMNS]

_FORMATS = {
    "residual %": "{:+.2f}",
    "peak in": "{}",
    "s a step": "{:.3f}",
    "± s": "{:.3f}",
    "last loss": "{:.4f}",
}


def _row(variant: Variant, first: Measurement) -> dict[str, float | str | None]:
    """A variant's values by heading, None where it has none."""
    measured, predicted, missed = variant.measurement, variant.predicted_bytes, variant.residual
    seconds = measured.seconds
    time_before = None if first.seconds is None else first.seconds.median
    time_after = None if seconds is None else seconds.median
    elsewhere = went_elsewhere(first, measured)
    ledger = [measured.columns[column] / MiB for column in COLUMNS]
    return {
        "predicted MiB": _in_mib(predicted),
        "measured MiB": measured.peak_bytes / MiB,
        "in tensors MiB": None if predicted is None else measured.known_bytes / MiB,
        "residual %": None if missed is None else 100 * missed,
        "× less": None if elsewhere else times_less(first.peak_bytes, measured.peak_bytes),
        "peak in": measured.phase,
        **dict(zip(_LEDGER_HEADINGS, ledger, strict=True)),
        "activations at backward MiB": _in_mib(measured.activations_at_backward),
        "outside MiB": _in_mib(measured.outside_bytes),
        "reserved MiB": _in_mib(measured.reserved_bytes),
        "device MiB": _in_mib(measured.device_bytes),
        "s a step": time_after,
        "± s": None if seconds is None else seconds.spread,
        "× time": times_time(time_before, time_after),
        "last loss": measured.losses[-1] if measured.losses else None,
    }


def _in_mib(count: int | None) -> float | None:
    return None if count is None else count / MiB
