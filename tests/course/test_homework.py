"""A learner's notebook is checked from outside."""

import nbformat
import pytest

from memlab import __main__ as commands
from memlab.course.homework import check

new = nbformat.v4

STAND_IN = """from types import SimpleNamespace
from memlab import exercises
def judge(answer):
    class Result(SimpleNamespace):
        def __str__(self):
            return "Passed: 2 MiB\\nmore" if self.passed else "Not solved yet"
    exercises.history.append(Result(passed=answer()))"""


def save(path, *sources):
    cells = [new.new_code_cell(STAND_IN), new.new_markdown_cell("# Exercises")]
    for source in sources:
        cells.append(new.new_code_cell(source, metadata={"tags": ["exercise"]}))
        cells.append(new.new_code_cell("judge(answer)", metadata={"tags": ["check"]}))
    nbformat.write(new.new_notebook(cells=cells), path)
    return path


def test_each_exercise_passes_or_not_whatever_the_others_do(tmp_path, capsys):
    answers = ("answer = lambda: True", "answer = lambda: 1 / 0", "answer = lambda: False")
    path = save(tmp_path / "answers.ipynb", *answers)
    before = path.read_bytes()
    assert commands.main(["check", str(path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "exercise 1: passed. Passed: 2 MiB",
        "exercise 2: NOT passed. ZeroDivisionError: division by zero",
        "exercise 3: NOT passed. Not solved yet",
    ]
    assert path.read_bytes() == before


def test_a_notebook_whose_exercises_all_pass(tmp_path):
    assert commands.main(["check", str(save(tmp_path / "a.ipynb", "answer = lambda: True"))]) == 0


def test_a_notebook_without_an_exercise_is_said(tmp_path, capsys):
    with pytest.raises(ValueError, match="no code cell has the tag 'check'"):
        check(save(tmp_path / "a.ipynb"))
    assert commands.main(["check", str(tmp_path / "none.ipynb")]) == 2
    assert "none.ipynb" in capsys.readouterr().err
