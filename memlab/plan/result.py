"""What a plan says: `Plan`."""

from __future__ import annotations

import html
from dataclasses import dataclass

from memlab.ledger import COLUMNS
from memlab.prediction import Fit, Prediction
from memlab.show import Table
from memlab.units import format_bytes

from .switches import BY_NAME, MODEL, NOTEBOOK, RECORDS


@dataclass(frozen=True)
class Rung:
    """A switch at its place: all those before it are on, too.

    Attributes:
        switch: its name; None is the run without any.
        needed_bytes: what the process needs then; where that was not predicted, at least so much.
        predicted: whether it was predicted. If not, weights, gradients and state alone do not fit.
        took_bytes: how much less that is than the rung before; None where one of the two was not
            predicted.
        off: why the plan does not have it on; empty if it has.
    """

    switch: str | None
    needed_bytes: int
    predicted: bool
    took_bytes: int | None
    off: str = ""


@dataclass(frozen=True)
class Plan:
    """Which switches make a training fit a GPU. It is true in an `if` when it fits.

    Attributes:
        title: what is trained.
        fit: of the run with all of `switches`.
        switches: those that are on, in order. Where nothing fits, those that need the least.
        rungs: what was tried, in order, and what each switch took off at its place.
        before: the prediction without a switch.
        after: that with `switches`.
        code: Python source that trains with them; of a run, the call.
        notes: what was assumed, and what the reader has to know.
    """

    title: str
    fit: Fit
    switches: tuple[str, ...]
    rungs: tuple[Rung, ...]
    before: Prediction
    after: Prediction
    code: str
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the training fits, with these switches."""
        return bool(self.fit)

    def __bool__(self) -> bool:
        return self.fits

    def _headline(self) -> str:
        on = ", ".join(self.switches) or "no switch"
        return f"{self.title}: {self.fit}\nwith {on}"

    def _ladder(self) -> Table:
        rows = []
        for rung in self.rungs:
            needs = format_bytes(rung.needed_bytes)
            took = "" if rung.switch is None else "-"
            if rung.took_bytes is not None:
                took = format_bytes(rung.took_bytes)
            switch = BY_NAME.get(rung.switch)
            rows.append(
                {
                    "switch": rung.switch or "none",
                    "needs": needs if rung.predicted else f"over {needs} *",
                    "took off": took,
                    "time of a step": "" if switch is None else f"x {switch.slower:.2f}",
                    "": rung.off,
                }
            )
        return Table(rows, numbers=("needs", "took off", "time of a step"))

    def _ledger(self) -> Table:
        rows = [
            {
                "": column.replace("_", " "),
                "before": format_bytes(self.before.columns[column]),
                "after": format_bytes(self.after.columns[column]),
            }
            for column in COLUMNS
            if self.before.columns[column] or self.after.columns[column]
        ]
        for name in ("allocated", "reserved", "process", "host"):
            rows.append(
                {
                    "": {"process": "the process, about", "host": "on the host"}.get(name, name),
                    "before": format_bytes(getattr(self.before, f"{name}_bytes")),
                    "after": format_bytes(getattr(self.after, f"{name}_bytes")),
                }
            )
        return Table(rows, numbers=("before", "after"))

    def _footnotes(self) -> list[str]:
        lines = []
        if not all(rung.predicted for rung in self.rungs):
            lines.append(
                "* by formula: weights, gradients and state alone are too large. What a switch took"
                " off is said between two predictions (every=True predicts all)"
            )
        if self.switches:
            lines.append(
                f"time of a step: measured in {NOTEBOOK} ({MODEL}; {RECORDS}), at its place there"
            )
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(
            [
                self._headline(),
                "",
                self._ladder().to_text(),
                *self._footnotes(),
                "",
                self._ledger().to_text(),
                "",
                self.code,
            ]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        said = "<br>".join(html.escape(line) for line in self._headline().split("\n"))
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in self._footnotes())
        tables = self._ladder().to_html() + notes + self._ledger().to_html()
        return f"<p><b>{said}</b></p>{tables}<pre>{html.escape(self.code)}</pre>"
