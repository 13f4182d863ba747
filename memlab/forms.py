"""What the files that memlab keeps have in common: strict models, errors in words, whole files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

Text = Annotated[str, StringConstraints(pattern=r"\S")]
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=0)]


class Model(BaseModel):
    """What all have in common: no field that is not named, nothing turned into another type, no
    NaN, and no change once it is made.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Machine(Model):
    """What a number depends on beside the code that was measured."""

    device: Literal["cpu", "cuda"]
    gpu: Text | None
    gpu_bytes: Count | None
    torch: Text
    driver: Text | None
    python: Text
    threads: Count


def in_words(error: ValidationError) -> str:
    """The first thing that a check found, in one line: where, what has to be, what was given."""
    problem = error.errors()[0]
    place = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"]
    ).lstrip(".")
    said = problem["msg"].removeprefix("Value error, ")
    given = (
        "" if problem["type"] in ("missing", "value_error") else f", not {problem['input']!r:.60}"
    )
    return f"{place}: {said}{given}" if place else f"{said}{given}"


def replace(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all, so that an interrupted run leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
