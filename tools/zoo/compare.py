"""One row of the zoo: predicted, measured, compared."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from memlab import measure, predict
from memlab.measurement import Measurement
from memlab.results.zoo import ZooRow
from tools.zoo.rows import Row, rows_with, training

#: Their tensors were seen on both sides, so that their types are known.
_TYPED = ("parameters", "gradients", "optimizer_state")


def compare(row: Row) -> ZooRow:
    """Predict a row for the CPU, measure it there, and say how far apart the two are."""
    run = training(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that the models are from
        measured = measure(run, device="cpu")
        try:
            predicted = predict(run, device="cpu", progress=False)
        except Exception as error:
            return ZooRow(
                model=row.animal.name,
                way=row.way.name,
                known_bytes=measured.known_bytes,
                refusal=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            )
    before, after = measured.known_columns, predicted.known_columns
    residuals = {name: after[name] - size for name, size in before.items() if after[name] != size}
    return ZooRow(
        model=row.animal.name,
        way=row.way.name,
        known_bytes=measured.known_bytes,
        predicted_bytes=predicted.known_bytes,
        residuals=residuals,
        same_phase=measured.phase == predicted.phase,
        same_types=_types(measured) == _types(predicted),
        notes=list(predicted.notes),
    )


def _types(found: Measurement) -> dict[tuple[str, str], int]:
    """Bytes by column and data type after the last step."""
    ledger = found.ledger
    types: dict[tuple[str, str], int] = {}
    for block in ledger.alive_at(found.steps[-1].end):
        if block.is_known and block.column in _TYPED and block.bytes > 64:
            key = block.column, str(block.dtype)
            types[key] = types.get(key, 0) + block.bytes
    return types


# In a process of its own --------------------------------------------------------------------------

_rows: list[Row] = []


def prepare(words: Sequence[str]) -> None:
    """Make this process ready to compare the rows that hold one of these words."""
    torch.set_num_threads(1)
    _rows.extend(rows_with(words))


def compare_number(number: int) -> ZooRow:
    """Compare one of them."""
    return compare(_rows[number])
