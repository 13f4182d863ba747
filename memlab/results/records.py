"""`record(...)` and `claim(...)`: a notebook keeps what it measured and what it found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from memlab.forms import in_words
from memlab.meters.device import environment as measured_environment
from memlab.results.environments import of_measurement
from memlab.results.models import Claim, Record, listed
from memlab.workloads.scale import scale as scale_of_this_device

if TYPE_CHECKING:
    from memlab.comparison import Comparison
    from memlab.comparison import Variant as Compared

#: The environment variable that names the file to which `record` appends, one JSON object a line.
VARIABLE = "MEMLAB_RECORDS"


def record(
    comparison: Comparison,
    *,
    notebook: str,
    technique: str,
    sizes: dict[str, object],
    tokens_per_step: int | None = None,
    loss: dict[str, float | None] | None = None,
    max_gradient_difference: dict[str, float | None] | None = None,
    scale: str | None = None,
) -> Record:
    """Make the record of a comparison, and append it to the file that MEMLAB_RECORDS names (if it
    names one).

    Args:
        comparison: what `memlab.compare` returned; the first variant is the baseline.
        notebook: the notebook's file name without `.ipynb`.
        technique: the technique's name, that of its module in `memlab.techniques`.
        sizes: what the run's bytes depend on, by name: `{"layers": 6, "batch_size": 8}`. Texts,
            numbers, true or false.
        tokens_per_step: tokens in one step, from which tokens per second are made where a step was
            timed.
        loss: variant → loss; a variant that is not named gets the last loss of its measurement, if
            there is one.
        max_gradient_difference: variant → largest difference of a gradient from the baseline's.
        scale: `"cpu"`, `"t4"`, `"gpu"` or `"large"`; by default what `memlab.workloads.scale()`
            chooses here.

    Returns:
        The record.

    Raises:
        ValueError: a name that is no variant's, a number that is not finite, or anything else that
            a results file cannot hold.
    """
    losses = _by_variant("loss", loss, comparison)
    differences = _by_variant("max_gradient_difference", max_gradient_difference, comparison)
    if tokens_per_step is not None and not (type(tokens_per_step) is int and tokens_per_step > 0):
        raise ValueError(
            f"tokens_per_step has to be a positive whole number, not {tokens_per_step!r}"
        )
    try:
        made = Record(
            notebook=notebook,
            technique=technique,
            scale=scale_of_this_device().name if scale is None else scale,
            sizes=sizes,
            environment=of_measurement(_environment_of_all(comparison)),
            variants=[
                _variant(each, tokens_per_step, losses, differences) for each in comparison.variants
            ],
        )
    except ValidationError as error:
        raise ValueError(f"the record of {notebook!r}: {in_words(error)}") from error
    _append(made)
    return made


def _by_variant(what: str, values: dict | None, comparison: Comparison) -> dict:
    names = [variant.name for variant in comparison.variants]
    if unknown := [name for name in values or {} if name not in names]:
        raise ValueError(f"{what} names {listed(unknown)}, but the comparison has {listed(names)}")
    return values or {}


def _environment_of_all(comparison: Comparison) -> Mapping[str, object]:
    first, *others = [variant.measurement.environment for variant in comparison.variants]
    for other in others:
        if any(other.get(key) != first.get(key) for key in ("device", "gpu")):
            raise ValueError(
                "the variants were measured on different devices: compare runs on one device"
            )
    return first


def _variant(
    compared: Compared, tokens_per_step: int | None, losses: dict, differences: dict
) -> dict[str, object]:
    measured = compared.measurement
    seconds = measured.seconds
    last_loss = measured.losses[-1] if measured.losses else None
    # Nothing is known where a GPU's history was too long to be kept.
    beside = measured.known_bytes and measured.known_bytes != measured.peak_bytes
    kept_seconds = speed = None
    if seconds is not None:
        kept_seconds = {
            "median": _rounded(seconds.median),
            "spread": _rounded(seconds.spread),
            "repeats": seconds.repeats,
        }
        if tokens_per_step is not None:
            speed = _rounded(tokens_per_step / seconds.median)
    return {
        "name": compared.name,
        "predicted_bytes": compared.predicted_bytes,
        "peak_bytes": measured.peak_bytes,
        "known_bytes": measured.known_bytes if beside else None,
        "columns": dict(measured.columns),
        "phase": measured.phase,
        "reserved_bytes": measured.reserved_bytes,
        "device_bytes": measured.device_bytes,
        "seconds": kept_seconds,
        "tokens_per_second": speed,
        "loss": _float(losses.get(compared.name, last_loss)),
        "max_gradient_difference": _float(differences.get(compared.name)),
    }


def claim(
    number: int, says: str, *, notebook: str, holds: bool, when: str = "", found: str
) -> Claim:
    """Give a verdict on one of the claims that the course tests, and append it to the file that
    MEMLAB_RECORDS names.

    The cell that calls it passes what it measured as `holds`, and asserts what `found` says.

    Args:
        number: the claim's number in the course's list.
        says: what the source says, in a few words.
        notebook: the notebook's file name without `.ipynb`.
        holds: whether the measurements bear the claim out.
        when: under which condition it holds; empty where it holds without one.
        found: one or two sentences: what holds instead, or what to know beside it. No number that
            another device would not give.

    Returns:
        The claim with its verdict, which a notebook shows.

    Raises:
        ValueError: something given cannot be kept, or `when` comes with a claim that does not hold.
    """
    if not isinstance(holds, bool):
        raise ValueError(f"holds has to be True or False, not {holds!r}")
    if when and not holds:
        raise ValueError(
            f"the claim does not hold, and yet it is said to hold when {when!r}: say it in `found`"
        )
    verdict = "does not hold" if not holds else f"holds when {when}" if when else "holds"
    try:
        made = Claim(
            number=number,
            notebook=notebook,
            says=says,
            verdict=verdict,
            found=found,
            environment=of_measurement(measured_environment()),
        )
    except ValidationError as error:
        raise ValueError(f"claim {number!r}: {in_words(error)}") from error
    _append(made)
    return made


def read_lines(path: Path) -> list[Record | Claim]:
    """Read what `record` and `claim` appended to a file.

    Args:
        path: the file that MEMLAB_RECORDS named; it need not be there.

    Returns:
        The records and claims in their order.

    Raises:
        ValueError: a line is neither a record nor a claim.
    """
    if not Path(path).is_file():
        return []
    either = TypeAdapter(Record | Claim)
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [either.validate_json(line) for line in lines if line]


def _append(made: Record | Claim) -> None:
    if path := os.environ.get(VARIABLE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(made.model_dump_json() + "\n")


def _float(value: object) -> float | None:
    return None if value is None else float(value)


def _rounded(value: float) -> float:
    """Six digits: a clock says no more, and the files stay readable."""
    return float(f"{value:.6g}")
