"""The form of `results/predictions.json`: what was predicted for a GPU's records, beside them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError, model_validator

from memlab.forms import Count, Model, Text, in_words, replace
from memlab.units import residual

#: The file's name. It lies beside the results files and is none.
PREDICTIONS = "predictions.json"

SCHEMA = 1


class Bytes(Model):
    """A prediction and the measurement that it is held against."""

    predicted: Count
    measured: Count

    @property
    def residual(self) -> float:
        """What the prediction missed, as a part of the prediction; above 0 it was too low."""
        return residual(self.measured, self.predicted)


class Place(Model):
    """Which variant it is: of which record, counted from 0, of which results file."""

    file: Text
    record: Annotated[int, Field(ge=0)]
    notebook: Text
    variant: Text


class Row(Place):
    """A variant that was predicted.

    `reserved` is None where the measured process did not begin with an empty cache: `why_not` says
    what else was there. `reason` explains a miss.
    """

    allocated: Bytes
    reserved: Bytes | None
    why_not: str = ""
    reason: str = ""


class Left(Place):
    """A variant that could not be predicted, and why."""

    reason: Text


class Summary(Model):
    """How far the predictions are off: parts of the prediction, without their sign.

    `underestimates` is how many of them were too low.
    """

    rows: Count
    median: float
    p95: float
    worst: float
    underestimates: Annotated[int, Field(ge=0)]


class Predictions(Model):
    """All of a GPU's records, predicted again."""

    gpu: Text
    torch: Text
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    allocated: Summary | None
    reserved: Summary | None
    rows: list[Row]
    not_predicted: list[Left]

    @model_validator(mode="after")
    def _summaries_follow_from_the_rows(self) -> Predictions:
        for column in ("allocated", "reserved"):
            if getattr(self, column) != summary_of(getattr(row, column) for row in self.rows):
                raise ValueError(f"the summary of {column} does not follow from the rows")
        return self


def summary_of(all_bytes: Iterable[Bytes | None]) -> Summary | None:
    """How far predictions are off; None where there is none."""
    missed = [each.residual for each in all_bytes if each is not None]
    if not missed:
        return None
    sizes = sorted(map(abs, missed))
    # The smallest value that at least 95 % of the rows are no worse than.
    p95 = sizes[-(-95 * len(sizes) // 100) - 1]
    return Summary(
        rows=len(sizes),
        median=_rounded(statistics.median(sizes)),
        p95=_rounded(p95),
        worst=_rounded(sizes[-1]),
        underestimates=sum(each > 0 for each in missed),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def load_predictions(root: Path) -> Predictions | None:
    """Read the checkout's predictions; None where there are none.

    Raises:
        ValueError: the file is not valid; the message says what is wrong, and where.
    """
    path = Path(root) / "results" / PREDICTIONS
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} is of another version: make validate writes it anew")
    try:
        return Predictions.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{path}: {in_words(error)}") from error


def write_predictions(root: Path, predictions: Predictions) -> None:
    """Write the checkout's predictions, whole or not at all."""
    data = {"schema": SCHEMA, **predictions.model_dump()}
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace(Path(root) / "results" / PREDICTIONS, text)
