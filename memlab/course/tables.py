"""Records as tables: for README.md and its like in Markdown, for the terminal as text."""

from __future__ import annotations

from collections.abc import Sequence

from memlab.course.words import caption, percent, times, with_spread
from memlab.results import Record, Results
from memlab.show import Table
from memlab.units import format_bytes

#: The columns of numbers, which are set to the right.
NUMBERS = {
    "predicted",
    "measured",
    "residual",
    "× less",
    "seconds (spread)",
    "minutes",
    "peak before",
    "peak after",
    "× time",
    "peak",
    "seconds a step",
    "committed",
}

Rows = list[dict[str, str]]


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table."""
    return Table(rows, NUMBERS).to_markdown()


def text(rows: Rows) -> str:
    """Rows as a table for the terminal."""
    return Table(rows, NUMBERS).to_text()


def captioned(data: Results, rows: Rows) -> str:
    """A table below the line that says where and when it was measured."""
    return "\n\n".join(filter(None, (caption(data), markdown(rows))))


# Every comparison ---------------------------------------------------------------------------------


def rows(record: Record) -> Rows:
    """A record in words, a row a variant."""
    baseline = record.variants[0]
    return [
        {
            "variant": variant.name,
            "predicted": format_bytes(variant.predicted_bytes),
            "measured": format_bytes(variant.peak_bytes),
            "residual": percent(variant.residual),
            "× less": times(variant.times_less(baseline)),
            "seconds (spread)": with_spread(variant.seconds),
        }
        for variant in record.variants
    ]


def results_table(data: Results) -> str:
    """A results file as Markdown: one line that says where it was measured, then a row
    a variant.
    """
    table = []
    for record in data.records:
        name = record.notebook
        if record.technique not in name:
            name += f": {record.technique}"
        for number, row in enumerate(rows(record)):
            table.append({"notebook": name if number == 0 else "", **row})
    return captioned(data, table)


def run_table(records: Sequence[Record], committed: Results | None = None) -> str:
    """Records in words, a line a variant, with the committed measurement beside each where there is
    one.

    Args:
        records: records of this run.
        committed: the committed results file of the same kind of device, if there is one.
    """
    table = []
    for position, record in enumerate(records):
        old = _same(records, position, committed)
        peaks = {variant.name: variant.peak_bytes for variant in old.variants} if old else {}
        other_sizes = old and (old.scale, old.sizes) != (record.scale, record.sizes)
        for number, row in enumerate(rows(record)):
            then = "other sizes" if other_sizes else format_bytes(peaks.get(row["variant"]))
            name = record.notebook if number == 0 else ""
            table.append({"notebook": name, **row, "committed": then})
    return text(table) if table else "Nothing was recorded."


def _same(records: Sequence[Record], position: int, committed: Results | None) -> Record | None:
    """The committed record of the same comparison: a notebook's n-th record of a technique is its
    n-th there, too.
    """
    record = records[position]

    def like(others: Sequence[Record]) -> list[Record]:
        return [
            other
            for other in others
            if (other.notebook, other.technique) == (record.notebook, record.technique)
        ]

    number = len(like(records[:position]))
    there = like(committed.records) if committed else []
    return there[number] if number < len(there) else None


# The capstone on a GPU ----------------------------------------------------------------------------


def gpu_table(files: Sequence[Results]) -> str:
    """What the capstone's recipe needs on a GPU, in small pieces and in large ones, and how long a
    step takes.
    """
    parts = []
    for data in files:
        if data.environment.device != "cuda":
            continue
        by_technique = {record.technique: record for record in data.records}
        if pieces := by_technique.get("larger pieces"):
            parts.append(captioned(data, _with_seconds(pieces)))
        if budget := by_technique.get("in 8 GiB"):
            trained = [f"{v.name}: {format_bytes(v.peak_bytes)}" for v in budget.variants]
            sizes = budget.sizes
            tokens = f"{sizes['batch_size']} × {sizes['sequence_length']:,} tokens"
            parts.append(f"In a budget of 8 GiB, {tokens} a step: {'; '.join(trained)}.")
    return "\n\n".join(parts)


def _with_seconds(record: Record) -> Rows:
    first = record.variants[0]
    table = []
    for variant in record.variants:
        factor = variant.times_time(first)
        table.append(
            {
                "": variant.name,
                "peak": format_bytes(variant.peak_bytes),
                "× less": times(variant.times_less(first), digits=1),
                "seconds a step": "-" if factor is None else f"{variant.seconds.median:.3f}",
                "× time": times(factor),
            }
        )
    return table
