"""The H100's records predicted without the H100, as one table."""

from __future__ import annotations

from memlab.course.tables import Rows
from memlab.results import Bytes, Predictions, Row, Summary
from memlab.show import Table

_HEADINGS = {
    "allocated": "allocated, predicted",
    "reserved": "reserved, predicted",
}
_NUMBERS = {*_HEADINGS.values(), "measured", "measured ", "residual", "residual "}


def predictions_table(predictions: Predictions | None) -> str:
    """All of it as Markdown: how far off in a few lines, a row a variant, what is explained."""
    if predictions is None:
        return "Nothing is predicted yet."
    parts = [_head(predictions), Table(_rows(predictions), _NUMBERS).to_markdown()]
    if explained := _explained(predictions):
        parts.append(explained)
    return "\n\n".join(parts)


def _head(predictions: Predictions) -> str:
    lines = [
        f"**Predicted for {predictions.gpu}, without it** (torch {predictions.torch}; predicted"
        f" {predictions.date})",
        "",
    ]
    for column in ("allocated", "reserved"):
        lines.append(f"- {column}: {in_words(getattr(predictions, column))}")
    return "\n".join(lines)


def in_words(summary: Summary | None) -> str:
    """A summary in one line."""
    if summary is None:
        return "no row"
    median, p95, worst = (f"{100 * v:.2f} %" for v in (summary.median, summary.p95, summary.worst))
    return (
        f"{summary.rows} rows, off by {median} in the median, by at most {p95} in 95 of 100, by"
        f" {worst} in the worst; {summary.underestimates} predicted too little"
    )


def in_one_line(predictions: Predictions | None) -> str:
    """How far off predictions were, for people who only want to know whether to believe them."""
    if predictions is None or predictions.allocated is None:
        return "Nothing is predicted yet."
    allocated = predictions.allocated
    equal = sum(row.allocated.predicted == row.allocated.measured for row in predictions.rows)
    return (
        f"Held against measurements on an {predictions.gpu}, to which nothing was fitted:"
        f" {allocated.rows} runs, allocated bytes equal in {equal}, off by at most"
        f" {100 * allocated.p95:.2f} % in 95 of 100 and by {100 * allocated.worst:.1f} % in the"
        " worst ([each with its residual](results/README.md#the-h100-predicted-without-it))."
    )


def _rows(predictions: Predictions) -> Rows:
    table = []
    last = None
    for number, row in enumerate(predictions.rows):
        record = row.file, row.record
        table.append(
            {
                "notebook": row.notebook if record != last else "",
                "variant": row.variant + _mark(number, row),
                "allocated, predicted": f"{row.allocated.predicted:,}",
                "measured": f"{row.allocated.measured:,}",
                "residual": _percent(row.allocated),
                "reserved, predicted": "-"
                if row.reserved is None
                else f"{row.reserved.predicted:,}",
                "measured ": "-" if row.reserved is None else f"{row.reserved.measured:,}",
                "residual ": _percent(row.reserved),
            }
        )
        last = record
    return table


def _percent(held: Bytes | None) -> str:
    if held is None:
        return "-"
    if held.predicted == held.measured:
        return "equal"
    return f"{100 * held.residual:+.3f} %"


def _mark(number: int, row: Row) -> str:
    return f" ({number + 1})" if row.reason else ""


def _explained(predictions: Predictions) -> str:
    reasons: dict[str, list[int]] = {}
    for number, row in enumerate(predictions.rows):
        if row.reason:
            reasons.setdefault(row.reason, []).append(number + 1)
    lines = [
        f"- ({'), ('.join(map(str, numbers))}) {reason}" for reason, numbers in reasons.items()
    ]
    missing: dict[tuple[str, str], list[str]] = {}
    for left in predictions.not_predicted:
        missing.setdefault((left.notebook, left.reason), []).append(left.variant)
    lines += [
        f"- Not predicted: {notebook}, {'; '.join(variants)}: {reason}."
        for (notebook, reason), variants in missing.items()
    ]
    return "\n".join(lines)
