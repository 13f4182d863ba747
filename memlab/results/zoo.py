"""The zoo's form: predictions for the CPU beside what was measured, a row a model and a way."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from memlab.forms import Bytes, Count, Model, Text, in_words

#: The file in results/ that holds it. It is no device's.
ZOO = "zoo.json"


class ZooRow(Model):
    """One model, trained in one way.

    Attributes:
        model: its name.
        way: how it was trained.
        known_bytes: what was measured: `Measurement.known_bytes`. None if the row was not run.
        predicted_bytes: the same of the prediction; None if it was refused.
        residuals: predicted less measured by column, where they differ.
        same_phase: whether both peaks were in the same phase.
        same_types: whether parameters, gradients and optimizer state had the same data types.
        notes: what the prediction assumed.
        refusal: the error of a prediction that was refused.
        reason: why it misses, in words.
    """

    model: Text
    way: Text
    known_bytes: Bytes
    predicted_bytes: Bytes | None = None
    residuals: dict[str, int] = {}
    same_phase: bool = True
    same_types: bool = True
    notes: list[str] = []
    refusal: Text | None = None
    reason: Text | None = None

    @property
    def name(self) -> str:
        """The model and the way."""
        return f"{self.model} · {self.way}"

    @property
    def sentence(self) -> str:
        """What was found, in one line."""
        if self.predicted_bytes is None:
            return f"{self.name}: {self.refusal}"
        return f"{self.name}: {self.residual:,} of {self.known_bytes:,} bytes {self.residuals}"

    @property
    def residual(self) -> int | None:
        """The worst difference in bytes, over the whole and the columns; None if refused."""
        if self.predicted_bytes is None:
            return None
        whole = self.predicted_bytes - self.known_bytes
        return max(abs(whole), *map(abs, self.residuals.values()), 0)


class Zoo(Model):
    """All rows, with the libraries that built the models."""

    torch: Text
    transformers: Text
    libraries: dict[str, str] = {}
    models: Count
    rows: list[ZooRow]


def load_zoo(path: Path) -> Zoo:
    """Read the zoo's file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one of this form; the message says what is wrong, and where.
    """
    try:
        return Zoo.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{path} is not the zoo's file: {in_words(error)}") from error
