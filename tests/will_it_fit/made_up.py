"""Predictions made up for the tests: 8B with some switches, and what they need on a 24 GB card."""

from memlab.units import GiB
from memlab.will_it_fit.rows import EXERCISE_MODEL, EXERCISE_SEQUENCE, GPUS, Options, Row, Rows
from memlab.workloads.geometries import parameters


def row(gibibytes, **options):
    options = Options(**{"model": EXERCISE_MODEL} | options)
    weights = 2 * GiB
    return Row(
        options=options,
        parameters=parameters(options.model),
        columns={"parameters": weights, "activations": gibibytes * GiB - weights},
        phase="backward",
        reserved_bytes=gibibytes * GiB,
        needed_bytes=dict.fromkeys(GPUS.values(), (gibibytes + 1) * GiB),
    )


def exercise(gibibytes, *switches):
    return row(gibibytes, sequence=EXERCISE_SEQUENCE, **dict.fromkeys(switches, True))


def table(*rows):
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21"}
    return Rows(date="2026-11-30", rows=list(rows), **versions)


TABLE = table(
    row(40, checkpoints=True),
    row(20, checkpoints=True, lora=True),
    row(3, model="GPT-2 124M", checkpoints=True),
    exercise(90),
    exercise(30, "lora"),
    exercise(20, "lora", "fused_loss"),
)
