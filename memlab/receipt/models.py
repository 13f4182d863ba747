"""The form of a receipt, and the file that keeps it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError, field_validator

from memlab.forms import Bytes, Count, Machine, Model, Text, in_words, replace
from memlab.ledger import COLUMNS, Block, Step, format_type
from memlab.units import format_bytes

#: The version of the form of a receipt. It grows when a reader of the old form would misread the
#: new one.
SCHEMA = 1

#: How many groups of blocks a receipt names; what the others hold is one number.
MOST_GROUPS = 50


#: A number that is a part of a module's name: that of a layer.
_LAYER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


class Group(Model):
    """Blocks that are for the same thing and of one size: what `count` of `bytes` each hold."""

    count: Count
    bytes: Bytes
    column: str
    operator: str
    module: str
    name: str
    dtype: str | None = None
    shape: list[int] | None = None

    @property
    def total(self) -> int:
        """The bytes of all of them."""
        return self.count * self.bytes

    @property
    def place(self) -> str:
        """Who made them and where, for people."""
        return " in ".join(part for part in (self.operator, self.module or self.name) if part)

    @property
    def type(self) -> str:
        """Their data type and shape, for people."""
        return format_type(self.dtype, None if self.shape is None else tuple(self.shape))

    def __str__(self) -> str:
        return f"{self.count} x {format_bytes(self.bytes)}, {self.type}"


class StepPeak(Model):
    """One step that was recorded in full: what it needed, and what may stay of it."""

    number: Count
    peak_bytes: Bytes
    phase: str
    bytes_left: Bytes


class Said(Model):
    """What the steps say (`memlab.verdict`)."""

    kind: str
    sentence: str
    bytes_a_step: int


class Receipt(Model):
    """What a run needed.

    Attributes:
        environment: device, GPU, torch, driver, Python, threads.
        peak_bytes: the most bytes alive at once.
        phase: the phase of the peak.
        columns: bytes by column at the peak.
        known_bytes: the most bytes without what operators took for themselves: what is compared.
        known_columns: bytes by column at that moment.
        blocks: the blocks alive at that moment, equal ones as one group, the largest group first.
        other_blocks_bytes: what the groups hold that are too small to be named.
        outside_bytes: the most bytes of tensors that the allocator did not hand out.
        building_peak_bytes: the most bytes before the first step (None: not known).
        step_count: how many steps were seen.
        steps: those that were recorded in full.
        verdict: what they say.
        holders: who holds what grows.
    """

    environment: Machine
    peak_bytes: Bytes
    phase: str
    columns: dict[str, Bytes]
    known_bytes: Bytes
    known_columns: dict[str, Bytes]
    blocks: list[Group]
    other_blocks_bytes: Bytes
    outside_bytes: Bytes
    building_peak_bytes: Bytes | None
    step_count: Bytes
    steps: list[StepPeak]
    verdict: Said
    holders: list[str]

    @field_validator("columns", "known_columns")
    @classmethod
    def _all_of_the_ledgers(cls, columns: dict[str, int]) -> dict[str, int]:
        if set(columns) != set(COLUMNS):
            raise ValueError(f"the columns have to be {', '.join(COLUMNS)}")
        return {column: columns[column] for column in COLUMNS}

    def save(self, path: str | Path) -> None:
        """Write the receipt as JSON, whole or not at all."""
        text = json.dumps({"schema": SCHEMA, **self.model_dump()}, indent=1, ensure_ascii=False)
        replace(path, text + "\n")


def load(path: str | Path) -> Receipt:
    """Read a receipt that `Measurement.save` wrote.

    Args:
        path: the file.

    Returns:
        The receipt.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a receipt of this version; the message says what is wrong, and where.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"a receipt is a JSON object, not {type(data).__name__}")
        if (version := data.pop("schema", None)) != SCHEMA:
            raise ValueError(f"its schema is version {version!r}; this memlab reads {SCHEMA}")
        return Receipt.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{path} is not a receipt: {in_words(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a receipt: {error}") from error


def groups(blocks: Iterable[Block], at: int | None = None) -> list[Group]:
    """Sum equal blocks: those of one size, type and shape that the same operator made in the same
    module, or in the same one of each layer (`blocks.*.mlp`).

    Args:
        blocks: from a ledger.
        at: the moment (nanoseconds) of which the columns are (None: that of their birth).

    Returns:
        The groups, that with the most bytes first.
    """
    counts: dict[tuple, int] = {}
    places: dict[tuple, set[tuple[str, str]]] = {}
    for block in blocks:
        # A module that has a name says enough: the names of its parameters would part equal blocks.
        place = (block.module, "" if block.module else block.name)
        column = block.column if at is None else block.column_at(at)
        made = (block.bytes, column, block.operator, block.dtype, block.shape)
        alike = (made, *(_LAYER.sub("*", name) if "." in name else name for name in place))
        counts[alike] = counts.get(alike, 0) + 1
        places.setdefault(alike, set()).add(place)

    made_groups = []
    for alike, count in counts.items():
        (size, column, operator, dtype, shape), module, name = alike
        if len(places[alike]) == 1:
            [(module, name)] = places[alike]
        group = Group(
            count=count,
            bytes=size,
            column=column,
            operator=operator,
            module=module,
            name=name,
            dtype=dtype,
            shape=None if shape is None else list(shape),
        )
        made_groups.append(group)
    # By name where the bytes are equal: the same run writes the same file.
    return sorted(
        made_groups,
        key=lambda group: (-group.total, group.column, group.place, group.bytes, group.type),
    )


def step_peaks(steps: Iterable[Step]) -> list[StepPeak]:
    """The steps that were recorded in full, as a receipt has them."""
    return [
        StepPeak(
            number=step.number,
            peak_bytes=step.peak_bytes,
            phase=step.phase,
            bytes_left=step.bytes_left,
        )
        for step in steps
        if step.peak_bytes is not None
    ]


def name_largest(all_groups: Sequence[Group]) -> tuple[list[Group], int]:
    """The groups that a receipt names, and the bytes of the others."""
    named = list(all_groups[:MOST_GROUPS])
    return named, sum(group.total for group in all_groups[MOST_GROUPS:])
