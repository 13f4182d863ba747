"""What stands behind the columns: the blocks, their data types, and the models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memlab.ledger import COLUMNS, Ledger, format_type
from memlab.receipt import Group, groups
from memlab.show import Table
from memlab.units import format_bytes

#: How a table calls what a parameter or a buffer is in its model.
_ROLES = {"trained": "trained", "frozen": "frozen", "buffer": "buffers", "": "not known"}


class Groups(list[Group]):
    """Groups of equal blocks, the largest first; they print as a table."""

    def table(self) -> Table:
        """What each group holds, and who made it where."""
        rows = []
        for group in self:
            rows.append(
                {
                    "together": format_bytes(group.total),
                    "blocks": f"{group.count} x {format_bytes(group.bytes)}",
                    "type": group.type,
                    "column": group.column.replace("_", " "),
                    "operator": group.operator,
                    "where": group.module or group.name,
                }
            )
        return Table(rows, numbers={"together", "blocks"})

    def __str__(self) -> str:
        return self.table().to_text()

    def _repr_html_(self) -> str:
        return self.table().to_html()


@dataclass(frozen=True)
class Breakdown:
    """Bytes by two things; it prints as a table.

    Attributes:
        rows_are: what a row is: "column" or "model".
        bytes: bytes by row and heading; every row has every heading.
    """

    rows_are: str
    bytes: Mapping[str, Mapping[str, int]]

    def table(self) -> Table:
        """The same as a table, with the sum of each row."""
        headings = list(next(iter(self.bytes.values()), ()))
        rows = []
        for name, row in self.bytes.items():
            cells = {heading: format_bytes(size) for heading, size in row.items()}
            together = format_bytes(sum(row.values()))
            rows.append({self.rows_are: name.replace("_", " "), **cells, "together": together})
        return Table(rows, numbers={*headings, "together"})

    def __str__(self) -> str:
        return self.table().to_text()

    def _repr_html_(self) -> str:
        return self.table().to_html()


def tabulate_columns(columns: Mapping[str, int], peak: int) -> Table:
    """The bytes by column and their share of the peak; empty columns are left out."""
    rows = []
    for name in COLUMNS:
        if columns[name]:
            share = f"{columns[name] / peak:.1%}"
            size = format_bytes(columns[name])
            rows.append({"column": name.replace("_", " "), "at the peak": size, "share": share})
    return Table(rows, numbers={"at the peak", "share"})


def largest_groups(ledger: Ledger, count: int, at: int | None = None) -> Groups:
    """The largest groups of equal blocks.

    Args:
        ledger: of a run.
        count: how many groups.
        at: a moment (nanoseconds; None: the peak).
    """
    at = ledger.peak_time if at is None else at
    return Groups(groups(ledger.alive_at(at), at)[:count])


def split_by_dtype(ledger: Ledger, columns: Mapping[str, int], at: int | None = None) -> Breakdown:
    """The bytes of a moment by column and data type.

    Args:
        ledger: of a run.
        columns: the bytes by column at that moment. What a column has beyond its blocks was in no
            tensor that was seen.
        at: that moment (nanoseconds; None: the peak).
    """
    at = ledger.peak_time if at is None else at
    sizes: dict[tuple[str, str], int] = {}
    for block in ledger.alive_at(at):
        key = (block.column_at(at), format_type(block.dtype))
        sizes[key] = sizes.get(key, 0) + block.bytes
    unseen = format_type(None)
    for column, size in columns.items():
        rest = size - sum(found for (name, _), found in sizes.items() if name == column)
        if rest:
            sizes[column, unseen] = sizes.get((column, unseen), 0) + rest
    types = sorted({name for _, name in sizes}, key=lambda name: (name == unseen, name))
    return _arrange("column", [name for name in COLUMNS if columns[name]], types, sizes)


def split_by_model(ledger: Ledger, at: int | None = None) -> Breakdown:
    """The parameters by model, trained and frozen apart, and the buffers.

    Args:
        ledger: of a run.
        at: a moment (nanoseconds; None: the peak).
    """
    blocks = ledger.alive_at(ledger.peak_time if at is None else at)
    parameters = [block for block in blocks if block.column == "parameters"]
    labels = sorted({block.model for block in parameters}, key=_in_order)
    names = _names_of(labels)
    sizes: dict[tuple[str, str], int] = {}
    for block in parameters:
        key = (names[block.model], _ROLES[block.role])
        sizes[key] = sizes.get(key, 0) + block.bytes
    roles = [name for name in _ROLES.values() if any(name == role for _, role in sizes)]
    return _arrange("model", [names[label] for label in labels], roles, sizes)


def _arrange(
    rows_are: str, rows: list[str], headings: list[str], sizes: Mapping[tuple[str, str], int]
) -> Breakdown:
    found = {row: {name: sizes.get((row, name), 0) for name in headings} for row in rows}
    return Breakdown(rows_are, found)


def _names_of(labels: Iterable[str]) -> dict[str, str]:
    """Models for people: `GPT`, and `GPT (1)` and `GPT (2)` where two are of one class."""
    models: dict[str, list[str]] = {}
    for label in labels:
        for model in label.split(" + "):
            of_class = models.setdefault(model.split("#")[0], [])
            if model not in of_class:
                of_class.append(model)

    def name(model: str) -> str:
        of_class = models[model.split("#")[0]]
        number = f" ({of_class.index(model) + 1})" if len(of_class) > 1 else ""
        return model.split("#")[0] + number

    return {
        label: " + ".join(map(name, label.split(" + "))) if label else "no model"
        for label in labels
    }


def _in_order(label: str) -> tuple[bool, str]:
    """By class and number, `GPT#2` before `GPT#10`; what belongs to no model comes last."""
    return not label, re.sub("[0-9]+", lambda number: number[0].zfill(9), label)
