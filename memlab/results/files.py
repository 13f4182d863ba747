"""Results files: which there are, reading, merging and writing them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from memlab.forms import replace
from memlab.results.models import Claim, Environment, Record, Results
from memlab.results.predictions import PREDICTIONS
from memlab.results.zoo import ZOO


def file_name(environment: Environment, scale: str | None = None) -> str:
    """Return the name of a device's results file: `cpu.json`, `nvidia-h200.json`.

    Args:
        environment: where something was measured.
        scale: in which sizes; those of the scale "large" have a file of their own.
    """
    name = (environment.gpu or environment.device) + (" large" if scale == "large" else "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def merge(
    data: Results | None, environment: Environment, notebook: str, fresh: Iterable[Record | Claim]
) -> Results:
    """Put a notebook's fresh records into a results file, in the place of its old ones.

    Args:
        data: the results file so far, None for a new one.
        environment: the environment of the run; it becomes the file's.
        notebook: the notebook that was run.
        fresh: what it kept in the file of MEMLAB_RECORDS (`read_lines`).

    Returns:
        The new results; nothing is written.
    """
    old = [] if data is None else [*data.records, *data.claims]
    kept = [each for each in old if each.notebook != notebook]
    for each in fresh:
        # A notebook knows its device. The commit and the date are those of the whole run.
        of_run = {"commit": environment.commit, "date": environment.date}
        its_environment = each.environment.model_copy(update=of_run)
        kept.append(each.model_copy(update={"environment": its_environment}))

    # Sorting is stable: a notebook's records stay in their order.
    records = [each for each in kept if isinstance(each, Record)]
    claims = [each for each in kept if isinstance(each, Claim)]
    return Results(
        environment=environment,
        records=sorted(records, key=lambda record: record.notebook),
        claims=sorted(claims, key=lambda claim: claim.number),
    )


def load(path: Path) -> Results:
    """Read a results file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a results file of this version; the message says what is wrong, and
            where.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        return Results.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a results file: {error}") from error


def load_all(root: Path) -> list[Results]:
    """Read the results file of every device, the CPU's first."""
    files = sorted(
        (
            path
            for path in (Path(root) / "results").glob("*.json")
            if path.name not in (PREDICTIONS, ZOO)
        ),
        key=lambda path: (path.name != "cpu.json", path.name),
    )
    return [load(path) for path in files]


def write(path: Path, data: Results) -> None:
    """Write a results file, whole or not at all."""
    replace(path, data.to_json())
