"""Why a row of the zoo misses, in words, by the model and the way."""

from __future__ import annotations

from memlab.course.zoo import is_miss
from memlab.results.zoo import ZooRow

#: What the model's name holds, what the way's holds, and the reason.
REASONS: tuple[tuple[str, str, str], ...] = ()


def with_reason(row: ZooRow) -> ZooRow:
    """A row that misses, with its reason as far as it was found out; any other as it is."""
    if not is_miss(row):
        return row
    for model, way, reason in REASONS:
        if model in row.model and way in row.way:
            return row.model_copy(update={"reason": reason})
    return row
