"""What the callbacks have in common: parts of a training that are watched, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from memlab.delivery import deliver
from memlab.measurement import Measurement
from memlab.watch import watch


class Parts:
    """Watches parts of a training that are given a name, each once.

    Args:
        first_step: the first step that is watched, counted from 1.
        last_step: the last one.
        report: where to write the receipt of the steps as an HTML page; that of the evaluation
            stands beside it, as `report.evaluation.html`.
        save: where to keep the receipts, in the same way.

    Raises:
        ValueError: there is no such step.
    """

    def __init__(
        self,
        first_step: int,
        last_step: int,
        report: str | Path | None = None,
        save: str | Path | None = None,
    ):
        for name, value, least in (
            ("first_step", first_step, 1),
            ("last_step", last_step, first_step),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name} has to be a whole number of at least {least}, not {value!r}"
                )
        self.first_step = first_step
        self.last_step = last_step
        self.measurements: dict[str, Measurement] = {}
        self.watching = ""
        self._begun: set[str] = set()
        self._files = {"report": report, "save": save}
        self._watch: watch | None = None

    def begin(self, name: str, model: nn.Module | None) -> None:
        """Begin to watch a stretch, unless one is being watched or this one was.

        The training goes on where it cannot be watched.
        """
        if self.watching or name in self._begun:
            return
        self._begun.add(name)
        started = watch() if model is None else watch(model)
        try:
            started.__enter__()
        except RuntimeError as refusal:  # under `python -m memlab run`, or a profiler
            print(f"memlab does not watch the {name}: {refusal}")
            return
        self.watching = name
        self._watch = started

    def end(self, name: str = "", *, say: Callable[[str], None] = print) -> dict[str, int]:
        """End the stretch that is being watched, and deliver its receipt.

        Args:
            name: end it only if it is this one.
            say: called with what is to be printed.

        Returns:
            What to log: the peak and its columns, in bytes. Nothing, if nothing was watched.
        """
        if not self.watching or name not in ("", self.watching):
            return {}
        ended, self._watch = self._watch, None
        title, self.watching = self.watching, ""
        ended.__exit__()
        try:
            measurement = ended.measurement
        except (RuntimeError, ValueError) as refusal:  # the training goes on
            say(f"memlab has no receipt of the {title}: {refusal}")
            return {}
        self.measurements[title] = measurement
        deliver(measurement, f"the {title}", say, **self._files_of(title))
        return _metrics(title, measurement)

    def _files_of(self, title: str) -> dict[str, Path]:
        named = {kind: Path(path) for kind, path in self._files.items() if path is not None}
        if title == "steps":
            return named
        return {kind: path.with_stem(f"{path.stem}.{title}") for kind, path in named.items()}


def _metrics(title: str, measurement: Measurement) -> dict[str, int]:
    start = f"memlab/{title}"
    by_column = {f"{start}/{column}": size for column, size in measurement.columns.items() if size}
    return {f"{start}/peak": measurement.peak_bytes, **by_column}
