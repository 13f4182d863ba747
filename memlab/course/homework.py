"""A learner's notebook checked from outside: which exercises pass, for a teacher or a script."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from memlab.course.notebook import runs

#: What is asked after each check: how many results there are, and the last one.
_ASK = """import json
from memlab import exercises
print(json.dumps([[result.passed, str(result)] for result in exercises.history]))"""


@dataclass(frozen=True)
class Answer:
    """One exercise of a notebook: whether it passed, and what its check said."""

    number: int
    passed: bool
    said: str

    def __str__(self) -> str:
        return f"exercise {self.number}: {'passed' if self.passed else 'NOT passed'}. {self.said}"


def check(path: Path, timeout: int = 600) -> list[Answer]:
    """Run a notebook from top to bottom, and say of each exercise whether it passes.

    A cell that fails does not keep the next ones from running. The file stays as it is.

    Args:
        path: the notebook, with a learner's answers in it.
        timeout: seconds that one cell may take.

    Returns:
        An answer for each cell tagged `check`, in order.

    Raises:
        ValueError: the file is no notebook, or has no exercise.
        OSError: it cannot be read.
    """
    import nbformat

    from memlab.course import kernel

    notebook = nbformat.read(path, as_version=4)
    cells = []
    for cell in notebook.cells:
        cell.metadata["tags"] = [*cell.metadata.get("tags", ()), "raises-exception"]
        cells.append(cell)
        if runs(cell, "check"):
            cells.append(nbformat.v4.new_code_cell(_ASK, metadata={"tags": ["raises-exception"]}))
    if len(cells) == len(notebook.cells):
        raise ValueError(f"{path} has no exercise: no code cell has the tag 'check'")
    notebook.cells = cells
    with tempfile.TemporaryDirectory() as folder:
        stopped = kernel.execute(
            notebook,
            folder=Path(path).resolve().parent,
            records=Path(folder) / "records",
            timeout=timeout,
            on_cell=_nothing,
            after_cell=_nothing,
            on_print=_nothing,
        )
    return _answers(cells, stopped)


def _answers(cells: list[dict], stopped: str) -> list[Answer]:
    found: list[Answer] = []
    known = 0
    for cell, asked in zip(cells, cells[1:], strict=False):
        if asked["source"] != _ASK:
            continue
        shown = "".join(output.get("text", "") for output in asked["outputs"])
        history = json.loads(shown) if shown.startswith("[") else []
        if len(history) > known:
            passed, said = history[-1]
            known = len(history)
        else:
            passed, said = False, _error(cell) or stopped or "its check gave no result"
        found.append(Answer(len(found) + 1, passed, said.splitlines()[0]))
    return found


def _error(cell: dict) -> str:
    """The error that a cell ended with, in one line."""
    errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
    return f"{errors[0]['ename']}: {errors[0]['evalue']}" if errors else ""


def _nothing(*_: object, **__: object) -> None:
    """Nobody watches."""
