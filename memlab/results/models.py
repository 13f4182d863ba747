"""The form of what is kept: what each value may be, checked whenever one is made or read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from memlab import units
from memlab.forms import Count, Machine, Model, Text, in_words
from memlab.ledger import COLUMNS, PHASES

#: The version of the form of a results file. It grows when a reader of the old form would misread
#: the new one. Version 1 did not know the column `kept`.
SCHEMA = 2

NotNegative = Annotated[float, Field(ge=0)]


class Environment(Machine):
    """What a result depends on beside the code that was measured."""

    commit: Text | None
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class Seconds(Model):
    """How long a step takes: the median of some repeats, and how far they lie apart."""

    median: NotNegative
    spread: NotNegative
    repeats: Count

    @property
    def steady(self) -> bool:
        """Whether the repeats lie within half of their median: else the machine was busy."""
        return self.spread <= 0.5 * self.median


class Variant(Model):
    """One run of a comparison. What does not apply, or was not measured, is None.

    `known_bytes` is the most that tensors held, where an operator took bytes for itself beside them
    at the peak. It is not in the file where it is None.
    """

    name: Text
    predicted_bytes: Count | None
    peak_bytes: Count
    known_bytes: Count | None = None
    columns: dict[str, Annotated[int, Field(ge=0)]]
    phase: str
    reserved_bytes: Count | None
    device_bytes: Count | None
    seconds: Seconds | None
    tokens_per_second: NotNegative | None
    loss: float | None
    max_gradient_difference: NotNegative | None

    @field_validator("columns")
    @classmethod
    def _all_of_the_ledgers(cls, columns: dict[str, int]) -> dict[str, int]:
        if set(columns) != set(COLUMNS):
            raise ValueError(f"the columns have to be {', '.join(COLUMNS)}")
        return {column: columns[column] for column in COLUMNS}

    @field_validator("phase")
    @classmethod
    def _a_phase(cls, phase: str) -> str:
        if phase not in PHASES:
            raise ValueError(f"a phase is one of {', '.join(PHASES)}")
        return phase

    @model_validator(mode="after")
    def _columns_are_the_peak(self) -> Variant:
        total = sum(self.columns.values())
        if total != self.peak_bytes:
            raise ValueError(f"the columns sum to {total}, but peak_bytes is {self.peak_bytes}")
        return self

    @property
    def residual(self) -> float | None:
        """What the prediction missed, as a part of the prediction; None where there was none.

        No formula says what an operator takes for itself, so that is left out.
        """
        return units.residual(self.known_bytes or self.peak_bytes, self.predicted_bytes)

    def times_less(self, baseline: Variant) -> float:
        """How many times smaller its peak is than the baseline's."""
        return units.times_less(baseline.peak_bytes, self.peak_bytes)

    def times_time(self, baseline: Variant) -> float | None:
        """How many times as long as the baseline's its step takes.

        None where one of them was not timed, or the machine was too busy to tell.
        """
        both = (baseline.seconds, self.seconds)
        if not all(seconds is not None and seconds.steady for seconds in both):
            return None
        return units.times_time(baseline.seconds.median, self.seconds.median)


class Record(Model):
    """A comparison of a notebook: the baseline first, the technique at its best last."""

    notebook: Text
    technique: Text
    scale: Text
    sizes: dict[str, str | bool | int | float]
    environment: Environment
    variants: Annotated[list[Variant], Field(min_length=1)]

    @field_validator("variants")
    @classmethod
    def _each_has_a_name_of_its_own(cls, variants: list[Variant]) -> list[Variant]:
        names = [variant.name for variant in variants]
        if len(set(names)) != len(names):
            raise ValueError(f"two variants have one name: {', '.join(map(repr, names))}")
        return variants

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        count = len(self.variants)
        printer.text(f"recorded: {count} variant{'s' * (count > 1)} of {self.technique}")


class Claim(Model):
    """A claim that a notebook tested, and its verdict."""

    number: Count
    notebook: Text
    says: Text
    verdict: Annotated[str, StringConstraints(pattern=r"^(holds|holds when \S.*|does not hold)$")]
    found: Text
    environment: Environment

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(f"Claim {self.number}: {self.says}\nVerdict: {self.verdict}.\n{self.found}")


class Results(Model):
    """A results file: the environment of the latest run, and what this and earlier runs kept."""

    environment: Environment
    records: list[Record]
    claims: list[Claim] = []

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read a results file's text.

        Raises:
            ValueError: it is not one of this version; the message says what is wrong, and where.
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"a results file is a JSON object, not {type(data).__name__}")
        version = data.pop("schema", None)
        if version not in range(1, SCHEMA + 1):
            raise ValueError(f"its schema is version {version!r}; this memlab reads up to {SCHEMA}")

        # A record in the file says of its environment only what differs from the file's.
        shared = data.get("environment")
        for kept in [*data.get("records", ()), *data.get("claims", ())]:
            if isinstance(kept, dict) and isinstance(shared, dict):
                kept["environment"] = shared | kept.get("environment", {})
                if version == 1:
                    _add_kept(kept)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(in_words(error)) from error

    def to_json(self) -> str:
        """The text of the file, its keys in one order."""

        def in_file(kept: Record | Claim) -> dict:
            fields = kept.model_dump()
            for variant in fields.get("variants", ()):
                if variant["known_bytes"] is None:
                    del variant["known_bytes"]
            shared = self.environment.model_dump()
            differing = {
                key: value for key, value in fields["environment"].items() if value != shared[key]
            }
            if differing:
                return fields | {"environment": differing}
            return {key: value for key, value in fields.items() if key != "environment"}

        data = {
            "schema": SCHEMA,
            "environment": self.environment.model_dump(),
            "records": [in_file(record) for record in self.records],
            "claims": [in_file(claim) for claim in self.claims],
        }
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _add_kept(record: dict) -> None:
    """Give a record of version 1 the column that it did not know: then it was in the batch."""
    for variant in record.get("variants", ()):
        if isinstance(variant, dict) and isinstance(variant.get("columns"), dict):
            variant["columns"].setdefault("kept", 0)


def listed(names: Iterable[object]) -> str:
    """Names for a message: `'a', 'b'`."""
    return ", ".join(repr(name) for name in names)
