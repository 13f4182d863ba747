"""Runs the notebooks and gathers what they record: the notebooks are the benchmark."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from memlab import results
from memlab.course.gathered import files_of
from memlab.course.notebook import count_cells, find_root, is_lesson, runs, source_hash, strip


@dataclass
class Outcome:
    """How one notebook's run ended.

    Attributes:
        notebook: the notebook that was run.
        seconds: how long it took, the kernel's start included.
        records: the records and claims that it kept.
        error: what went wrong, in one line; empty when all went well.
        cell: where it went wrong: the cell's number as Jupyter shows it, None if no cell is to
            blame.
        copy: the executed copy, if one was written.
    """

    notebook: Path
    seconds: float = 0.0
    records: list[results.Record | results.Claim] = field(default_factory=list)
    error: str = ""
    cell: int | None = None
    copy: Path | None = None

    @property
    def failed(self) -> bool:
        """Whether the notebook did not run to its end."""
        return bool(self.error)

    def __str__(self) -> str:
        line = f"{self.notebook.stem:<32} {self.seconds:6.1f} s  "
        if not self.failed:
            return f"{line}ok"
        return f"{line}FAILED{'' if self.cell is None else f' in cell [{self.cell}]'}: {self.error}"


def run(
    notebooks: Iterable[str | Path],
    *,
    in_place: bool = False,
    output: str | Path | None = None,
    timeout: int = 600,
    root: Path | None = None,
    cells: str | None = None,
) -> list[Outcome]:
    """Run notebooks, each in its folder and with a kernel of this very Python, and gather their
    records.

    A notebook that fails does not keep the next from running; it is printed with its cell and its
    error, and its records are left out. The executed copies go to `output`/notebooks and the
    records to `output`/results: nothing else in the checkout changes.

    Args:
        notebooks: the notebooks to run.
        in_place: write the outputs into the notebooks themselves, without what must not be
            committed (`strip`), and the records into `results/`, each in place of the notebook's
            old ones. A notebook that fails stays as it was.
        output: the folder for copies and records; by default `build` in the checkout.
        timeout: seconds that one cell may take.
        root: the checkout; by default `find_root()`.
        cells: run only the code cells with this tag, in their order. Then `in_place` is about the
            records alone: a notebook of which a part was run is not written.

    Returns:
        How each of them ended.

    Raises:
        ModuleNotFoundError: nbclient is not installed.
        ValueError: with `in_place`, the results file that is there is not valid.
    """
    _need_nbclient()
    root = find_root() if root is None else Path(root)
    output = root / "build" if output is None else Path(output).resolve()
    files = files_of(root if in_place else output, root, in_place)
    books = [(Path(path).resolve(), count_cells(path, cells)) for path in notebooks]
    outcomes = []
    total = sum(count for _, count in books)
    with tqdm(total=total, unit="cell", disable=None, leave=False) as bar:
        done = 0
        for path, count in books:
            outcome, executed = _run_one(path, timeout, bar, cells)
            done += count
            bar.update(done - bar.n)  # the cells that a failure left out
            if executed is not None:
                whole = in_place and cells is None and not outcome.failed
                copy = path if whole else output / "notebooks" / _place(path, root)
                _save(executed, copy, for_commit=whole)
                outcome.copy = copy
            file = files[is_lesson(path, root)]
            if not outcome.failed and (left := file.add(path.stem, outcome.records)):
                bar.write(left)
            outcomes.append(outcome)
            bar.write(str(outcome))
    return outcomes


def _need_nbclient() -> None:
    try:
        # Asked for here, so that it is missing before the first notebook, not in it.
        import nbclient  # noqa: F401
        import nbformat  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, and it takes it to run notebooks: pip install"
            " 'memlab[course]'"
        ) from error


def _save(notebook: dict, path: Path, for_commit: bool) -> None:
    import nbformat

    if for_commit:
        strip(notebook)
        notebook.metadata.setdefault("memlab", {})["source_hash"] = source_hash(notebook)
    text = nbformat.writes(notebook, version=nbformat.NO_CONVERT)
    results.replace(path, text.rstrip() + "\n")


def _place(path: Path, root: Path) -> Path:
    """Where a notebook's copy goes below `output`/notebooks: as in the checkout."""
    folder = (root / "notebooks").resolve()
    return path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)


def _run_one(path: Path, timeout: int, bar: tqdm, tag: str | None) -> tuple[Outcome, dict | None]:
    """Run one notebook. How it ended, and the executed notebook (None if it could not be read)."""
    import nbformat

    from memlab.course import kernel

    outcome = Outcome(path)
    began = time.perf_counter()
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:  # nbformat's errors are ValueErrors
        outcome.error = f"cannot be read: {kernel.first_line(str(error))}"
        return outcome, None
    if tag is not None:
        notebook.cells = [cell for cell in notebook.cells if runs(cell, tag)]
        if not notebook.cells:
            outcome.error = f"no code cell has the tag {tag!r}"
            return outcome, None

    number = 0

    def on_cell(**_: object) -> None:
        nonlocal number
        number += 1
        bar.set_description(f"{path.stem} [{number}]")

    with tempfile.TemporaryDirectory(prefix="memlab-") as folder:
        lines = Path(folder) / "records.jsonl"
        outcome.error = kernel.execute(
            notebook,
            folder=path.parent,
            records=lines,
            timeout=timeout,
            on_cell=on_cell,
            after_cell=lambda **_: bar.update(),
            on_print=lambda line: bar.set_postfix_str(line[:80]),
        )
        if outcome.failed:
            outcome.cell = number or None
        else:
            _read_records(outcome, lines)
    outcome.seconds = time.perf_counter() - began
    return outcome, notebook


def _read_records(outcome: Outcome, lines: Path) -> None:
    try:
        outcome.records = results.read_lines(lines)
    except ValueError as error:
        outcome.error = f"its records cannot be read: {error}"
    strangers = {each.notebook for each in outcome.records} - {outcome.notebook.stem}
    if strangers:
        named = ", ".join(sorted(strangers))
        outcome.error = f"it records under another notebook's name: {named}"
        outcome.records = []


def summary(outcomes: Sequence[Outcome]) -> str:
    """How a run ended: how many notebooks, how long, and what failed where."""
    failed = [outcome for outcome in outcomes if outcome.failed]
    seconds = sum(outcome.seconds for outcome in outcomes)
    count = len(outcomes)
    lines = [f"{count} notebook{'s' * (count != 1)} in {seconds:.0f} s, {len(failed)} failed"]
    for outcome in failed:
        where = "" if outcome.cell is None else f", cell [{outcome.cell}]"
        lines.append(f"  {outcome.notebook.name}{where}: {outcome.error}")
        if outcome.copy is not None:
            lines.append(f"    the copy with its outputs: {outcome.copy}")
    return "\n".join(lines)
