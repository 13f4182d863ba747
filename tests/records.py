"""Made-up records, claims and results files, for the tests of what is kept and of what is shown."""

from memlab.ledger import COLUMNS
from memlab.results import Claim, Environment, Record, Results, Seconds, Variant
from memlab.units import MiB

ENVIRONMENT = Environment(
    device="cpu",
    gpu=None,
    gpu_bytes=None,
    torch="2.13.0",
    driver=None,
    python="3.11.7",
    threads=2,
    commit="0" * 40,
    date="2026-01-31",
)
GPU = ENVIRONMENT.model_copy(
    update={
        "device": "cuda",
        "gpu": "NVIDIA H200",
        "gpu_bytes": 140 * 2**30,
        "driver": "575.1",
    }
)


def timed(median, spread=0.01):
    return Seconds(median=median, spread=spread, repeats=3)


def variant(name="before", peak=4 * MiB, predicted=None, seconds=None, **more):
    """A variant whose peak is all parameters."""
    fields = {
        "name": name,
        "predicted_bytes": predicted,
        "peak_bytes": peak,
        "columns": dict.fromkeys(COLUMNS, 0) | {"parameters": peak},
        "phase": "backward",
        "reserved_bytes": None,
        "device_bytes": None,
        "seconds": seconds,
        "tokens_per_second": None,
        "loss": None,
        "max_gradient_difference": None,
    }
    return Variant(**fields | more)


def pair(after_seconds=None, difference=None):
    """4 MiB, timed and predicted to the byte, and the 2 MiB that a technique made of them."""
    return [
        variant(predicted=4 * MiB, seconds=timed(0.5, 0.0123457)),
        variant(
            "after",
            2 * MiB,
            predicted=2 * MiB + 20972,
            seconds=after_seconds,
            max_gradient_difference=difference,
        ),
    ]


def record(notebook="03_x", technique="x", variants=None, environment=ENVIRONMENT, **more):
    fields = {"scale": "cpu", "sizes": {"layers": 2}, **more}
    return Record(
        notebook=notebook,
        technique=technique,
        environment=environment,
        variants=pair() if variants is None else variants,
        **fields,
    )


def claim(number=3, verdict="holds", notebook="03_x", environment=ENVIRONMENT):
    return Claim(
        number=number,
        notebook=notebook,
        says="less memory",
        verdict=verdict,
        found="It is so.",
        environment=environment,
    )


def results_file(*kept, environment=ENVIRONMENT):
    """A file of records and claims; those of the usual environment are taken to be of this one."""

    def of_this(each):
        if each.environment != ENVIRONMENT:
            return each
        return each.model_copy(update={"environment": environment})

    return Results(
        environment=environment,
        records=[of_this(each) for each in kept if isinstance(each, Record)],
        claims=[of_this(each) for each in kept if isinstance(each, Claim)],
    )
