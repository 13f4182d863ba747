"""Where a receipt goes: it is said, kept in a file, written as a page; under a name a rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from memlab import page
from memlab.measurement import Measurement
from memlab.show import Table
from memlab.units import format_bytes

#: How many groups of blocks are said.
LARGEST = 5


def deliver(
    measurement: Measurement,
    title: str,
    say: Callable[[str], None],
    *,
    report: str | Path | None = None,
    save: str | Path | None = None,
    why: Sequence[str] = (),
) -> None:
    """Say a receipt, and write its files.

    Args:
        measurement: what was measured.
        title: what it is of: a script, a stretch of a training.
        say: called with each text.
        report: where to write it as an HTML page.
        save: where to keep it (`memlab.receipt`).
        why: why it did not fit, in lines, where it did not.
    """
    title += rank_in_words()
    lines = [f"memlab: the receipt of {title}", str(measurement), *_largest(measurement)]
    say("\n".join([*lines, *_made_at(measurement), *why]))
    if save is not None:
        measurement.save(of_this_rank(save))
        say(f"kept in {of_this_rank(save)}")
    if report is not None:
        page.write(of_this_rank(report), measurement, title, why)
        say(f"written: {of_this_rank(report)}")


def _largest(measurement: Measurement) -> list[str]:
    table = measurement.groups(LARGEST).table().to_text(headings=False)
    return ["Largest at the peak:", *(f"  {line}" for line in table.splitlines())] if table else []


def _made_at(measurement: Measurement) -> list[str]:
    """The lines of the user's code that made most of the peak, if lines were noted."""
    sizes: dict[str, int] = {}
    for block in measurement.largest(None):
        if block.line:
            sizes[block.line] = sizes.get(block.line, 0) + block.bytes
    most = sorted(sizes, key=lambda line: (-sizes[line], line))[:LARGEST]
    grows: dict[str, int] = {}
    if measurement.verdict.kind == "creep":
        for growth in measurement.growth:
            grows[growth.line] = grows.get(growth.line, 0) + growth.bytes_a_step
    marks = {line: f"grows by {format_bytes(size)} a step" for line, size in grows.items() if size}
    rows = [
        {"bytes": format_bytes(sizes[line]), "line": line, "grows": marks.get(line, "")}
        for line in most
    ]
    table = Table(rows, numbers={"bytes"}).to_text(headings=False)
    return (
        ["Lines that made most of it:", *(f"  {line}" for line in table.splitlines())]
        if rows
        else []
    )


def rank_in_words() -> str:
    """Which of several processes this is (torchrun says it); nothing where there is only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    return f", rank {os.environ['RANK']}"


def of_this_rank(path: str | Path) -> Path:
    """The file of this rank: report.rank1.html. One process alone has the file as it was named."""
    path = Path(path)
    if not rank_in_words():
        return path
    return path.with_stem(f"{path.stem}.rank{os.environ['RANK']}")
