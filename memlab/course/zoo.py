"""The zoo's table: how far predictions for the CPU are from what was measured there."""

from __future__ import annotations

import statistics

from memlab.results.zoo import Zoo, ZooRow
from memlab.show import Table

#: What a row may be apart: scalars that operators of PyTorch make inside.
SLACK = 256


def zoo_table(zoo: Zoo) -> str:
    """The zoo as Markdown: a summary, a row a model, and each row that misses with its reason."""
    models = dict.fromkeys(row.model for row in zoo.rows)
    table = [_model_row(name, [row for row in zoo.rows if row.model == name]) for name in models]
    parts = [
        summary(zoo),
        Table(table, {"rows", "worst residual (bytes)", "of (bytes)"}).to_markdown(),
    ]
    misses = [_miss(row) for row in zoo.rows if is_miss(row)]
    if misses:
        numbers = {"predicted − measured (bytes)", "measured (bytes)"}
        parts += ["The rows that miss, and why:", Table(misses, numbers).to_markdown()]
    return "\n\n".join(parts)


def summary(zoo: Zoo) -> str:
    """The zoo in one paragraph: rows, median, p95 and worst."""
    residuals = sorted(row.residual for row in zoo.rows if row.residual is not None)
    refused = sum(row.residual is None for row in zoo.rows)
    middle = statistics.median(residuals)
    most = residuals[-(-95 * len(residuals) // 100) - 1]
    worst = max((row for row in zoo.rows if row.residual is not None), key=lambda r: r.residual)
    within = sum(residual <= SLACK for residual in residuals)
    libraries = ", ".join(f"{name} {version}" for name, version in zoo.libraries.items())
    return (
        f"{len(zoo.rows)} rows of {zoo.models} models (torch {zoo.torch}, transformers"
        f" {zoo.transformers}{', ' + libraries if libraries else ''}), each predicted for the CPU"
        f" and measured there. The residual is the largest difference in bytes, of the whole and of"
        f" each column: **median {middle:,.0f}, p95 {most:,}, worst {worst.residual:,}**"
        f" ({worst.model}, {worst.way}). Within {SLACK} bytes: {within}; refused with an error:"
        f" {refused}."
    )


def is_miss(row: ZooRow) -> bool:
    """Whether a row is refused, or further apart than scalars are."""
    return row.residual is None or row.residual > SLACK


def _model_row(name: str, rows: list[ZooRow]) -> dict[str, str]:
    predicted = [row for row in rows if row.residual is not None]
    worst = max(predicted, key=lambda row: row.residual, default=None)
    return {
        "model": name,
        "rows": str(len(rows)),
        "worst residual (bytes)": "refused" if worst is None else f"{worst.residual:,}",
        "of (bytes)": "-" if worst is None else f"{worst.known_bytes:,}",
        "in": "-" if worst is None or not worst.residual else worst.way,
    }


def _miss(row: ZooRow) -> dict[str, str]:
    residual = "refused"
    if row.predicted_bytes is not None:
        residual = f"{row.predicted_bytes - row.known_bytes:+,}"
    return {
        "model": row.model,
        "way": row.way,
        "predicted − measured (bytes)": residual,
        "measured (bytes)": f"{row.known_bytes:,}",
        "why": row.reason or row.refusal or "-",
    }
