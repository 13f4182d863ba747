"""What is shown of the predictions that are kept: the figure with the lines, a table, a card."""

from __future__ import annotations

from memlab import figures
from memlab.meters.gpus import find_gpu
from memlab.show import Table
from memlab.units import format_bytes
from memlab.will_it_fit.rows import EXERCISE_MODEL, GPUS, LINES_SEQUENCE, Row, Rows

_SMALL, _LARGE = GPUS["24 GB"], GPUS["80 GB"]


def on_the_lines(rows: Rows) -> list[Row]:
    """Return the rows of every model, in full and with adapters, as the figure has them."""
    return [row for row in rows.rows if row.options.sequence == LINES_SEQUENCE]


def lines(rows: Rows) -> figures.Drawing:
    """Draw what every model needs, in full and with adapters, and the cards' memory as lines."""
    shown = {f"{row.options.model}, {_way(row)}": row for row in on_the_lines(rows)}
    return figures.predicted(
        {name: row.columns for name, row in shown.items()},
        # On the largest card: what the others have less is no more than the context's estimate.
        {name: row.needed_bytes[GPUS["141 GB"]] for name, row in shown.items()},
        {box: find_gpu(gpu).memory_bytes for box, gpu in GPUS.items()},
        f"Predicted: one sequence of {LINES_SEQUENCE:,} tokens, with checkpoints",
    )


def verdicts(rows: Rows) -> Table:
    """Return a table: what every model needs, and which cards it fits."""
    table = []
    for row in on_the_lines(rows):
        cells = {
            "model": row.options.model,
            "training": _way(row),
            "allocated": format_bytes(row.allocated_bytes),
            "reserved": format_bytes(row.reserved_bytes),
            "peak in": row.phase,
        }
        for box, gpu in GPUS.items():
            cells[box] = "fits" if row.fits(gpu) else "-"
        table.append(cells)
    return Table(table, numbers=("allocated", "reserved"))


def card(rows: Rows) -> str:
    """Return the lesson's card in Markdown: what it costs here, and what it says of two models."""
    small = rows.find(model="GPT-2 124M", checkpoints=True)
    full = rows.find(model=EXERCISE_MODEL, checkpoints=True)
    lora = rows.find(model=EXERCISE_MODEL, checkpoints=True, lora=True)
    table = [
        {
            "": "*measured on a GPU*",
            "GPT-2 124M": "no record of this loop yet",
            EXERCISE_MODEL: "no record of this loop yet",
        },
        {
            "": "*predicted for an H100 80GB*",
            "GPT-2 124M": f"full: {format_bytes(small.needed_bytes[_LARGE])}",
            EXERCISE_MODEL: f"full: {format_bytes(full.needed_bytes[_LARGE])},"
            f" LoRA: {format_bytes(lora.needed_bytes[_LARGE])}",
        },
        {
            "": "*predicted: fits 24 GB, 80 GB*",
            "GPT-2 124M": f"full: {_both(small)}",
            EXERCISE_MODEL: f"full: {_both(full)}; LoRA: {_both(lora)}",
        },
    ]
    return Table(table).to_markdown()


def _way(row: Row) -> str:
    return "LoRA" if row.options.lora else "full"


def _both(row: Row) -> str:
    return ", ".join("yes" if row.fits(gpu) else "no" for gpu in (_SMALL, _LARGE))
