"""`compare(before, after, predicted=...)`: measurements side by side, with what was predicted and
what is left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from memlab.ledger import COLUMNS
from memlab.measurement import Measurement
from memlab.units import MiB, format_bytes, residual

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
        """What happened, in one line."""
        first, last = self.variants[0].measurement, self.variants[-1].measurement
        if len(self.variants) == 1:
            predicted, residual = self.variants[0].predicted_bytes, self.variants[0].residual
            beside = (
                ""
                if predicted is None
                else f", predicted {format_bytes(predicted)} ({100 * residual:+.2f} %)"
            )
            return f"Peak {format_bytes(first.peak_bytes)}{beside}"
        difference = last.peak_bytes - first.peak_bytes
        if not difference:
            return f"Peak unchanged at {format_bytes(first.peak_bytes)}"
        peaks = f"{format_bytes(first.peak_bytes)} → {format_bytes(last.peak_bytes)}"
        factor, direction = (self.ratio, "less") if difference < 0 else (1 / self.ratio, "more")
        times = (
            f"{factor:.2f}× {direction}"
            if factor >= 1.005
            else f"{format_bytes(abs(difference))} {direction}"
        )
        # The column that went farthest the way of the peak. There is one, since the columns add up
        # to it.
        change = self.change()
        column = min(change, key=change.get) if difference < 0 else max(change, key=change.get)
        moved = (
            f"{column.replace('_', ' ')}"
            f" {'−' if difference < 0 else '+'}{format_bytes(abs(change[column]))}"
        )
        phase = f", the peak is now in {last.phase}" if last.phase != first.phase else ""
        return f"Peak {peaks} ({times}): {moved}{phase}"

    def to_frame(self) -> pd.DataFrame:
        """One row a variant: predicted and measured peak and the ledger's columns (MiB), residual
        (%), time, loss.

        "In tensors" are the measurement's known bytes, which the residual is about. They are shown
        where they are not the whole peak.
        Columns in which no variant has a value are left out.
        """
        baseline = self.variants[0].measurement
        rows = {}
        for variant in self.variants:
            m = variant.measurement
            rows[variant.name] = {
                "predicted MiB": (
                    None if variant.predicted_bytes is None else variant.predicted_bytes / MiB
                ),
                "measured MiB": m.peak_bytes / MiB,
                "in tensors MiB": (
                    None if variant.predicted_bytes is None else m.known_bytes / MiB
                ),
                "residual %": None if variant.residual is None else 100 * variant.residual,
                "× less": baseline.peak_bytes / m.peak_bytes,
                "peak in": m.phase,
                **{
                    f"{column.replace('_', ' ')} MiB": m.columns[column] / MiB for column in COLUMNS
                },
                "reserved MiB": None if m.reserved_bytes is None else m.reserved_bytes / MiB,
                "device MiB": None if m.device_bytes is None else m.device_bytes / MiB,
                "s a step": None if m.seconds is None else m.seconds.median,
                "± s": None if m.seconds is None else m.seconds.spread,
                "× time": (
                    None
                    if m.seconds is None or baseline.seconds is None
                    else m.seconds.median / baseline.seconds.median
                ),
                "last loss": None if not m.losses else m.losses[-1],
            }
        frame = pd.DataFrame.from_dict(rows, orient="index")
        # What is in tensors is what the residual is about. It says something where that is not all.
        if all(v.measurement.known_bytes == v.measurement.peak_bytes for v in self.variants):
            frame = frame.drop(columns="in tensors MiB")
        # A column of the ledger that is 0 everywhere, or a value that this device does not have,
        # says nothing.
        if len(self.variants) == 1:
            frame = frame.drop(columns=["× less", "× time"])
        empty = [
            c
            for c in frame
            if frame[c].isna().all() or (c.removesuffix(" MiB") in _WORDS and not frame[c].any())
        ]
        return frame.drop(columns=empty)

    def plot(self, title: str | None = None) -> Figure:
        """The ledgers on one axis, the predictions as marks, and the timelines below. The title
        says what happened.
        """
        from memlab import figures  # here, so that a comparison can be made where nothing is drawn

        return figures.comparison(self, title)

    def _display_frame(self) -> pd.DataFrame:
        frame = self.to_frame()
        formats = {
            "residual %": "{:+.2f}",
            "s a step": "{:.3f}",
            "± s": "{:.3f}",
            "last loss": "{:.4f}",
        }
        shown = frame.copy().astype(object)
        for column in frame:
            form = formats.get(column, "{:,.2f}")
            values = frame[column]
            if column == "peak in":
                continue
            shown[column] = ["-" if pd.isna(value) else form.format(value) for value in values]
        return shown

    def __str__(self) -> str:
        return f"{self._display_frame().T.to_string()}\n{self.verdict}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"{self._display_frame().T.to_html()}<div><b>{self.verdict}</b></div>"


_WORDS = {column.replace("_", " ") for column in COLUMNS}


def compare(
    *measurements: Measurement,
    names: Sequence[str] | None = None,
    predicted: Sequence[int | None] | int | None = None,
) -> Comparison:
    """Set measurements side by side: the baseline first, then what the techniques made of it.

    Args:
        measurements: two or more (one is allowed, to set it beside a prediction).
        names: one for each; by default "before" and "after", or "1", "2", ...
        predicted: the predicted peaks in bytes, one for each, None where there was no prediction. A
            single number is the prediction for the last.

    Raises:
        ValueError: nothing to compare, a run that allocated nothing, names or predictions that do
            not match, or a prediction that is not a positive whole number.
    """
    if not measurements:
        raise ValueError("there is nothing to compare: pass measurements, the baseline first")
    for measurement in measurements:
        if not isinstance(measurement, Measurement):
            raise ValueError(
                f"compare() takes what measure() returned, not {type(measurement).__name__}"
            )
        if not measurement.peak_bytes:
            device = measurement.environment.get("device")
            raise ValueError(
                f"a run that allocated nothing on {device} cannot be compared: does its step work"
                " there?"
            )
    count = len(measurements)
    if names is None:
        names = {1: ["measured"], 2: ["before", "after"]}.get(count) or [
            str(i + 1) for i in range(count)
        ]
    if isinstance(names, str):
        names = [names]
    if predicted is None or not isinstance(predicted, Sequence):
        predicted = [None] * (count - 1) + [predicted]
    for what, given in (("names", names), ("predictions", predicted)):
        if len(given) != count:
            raise ValueError(f"{count} measurements need {count} {what}, not {len(given)}")
    if len(set(names)) != count:
        raise ValueError(
            f"every measurement needs a name of its own, and these repeat: {list(names)}"
        )
    for name, value in zip(names, predicted, strict=True):
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value <= 0
        ):
            raise ValueError(
                f"the prediction for {name!r} has to be a positive whole number of bytes, not"
                f" {value!r}"
            )
    triples = zip(names, measurements, predicted, strict=True)
    return Comparison([Variant(name, m, value) for name, m, value in triples])
