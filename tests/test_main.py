"""The commands, as a person calls them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import memlab
from memlab import __main__ as commands
from memlab import results
from memlab.course import documents, notebook, run
from tests.records import record, results_file, variant

new = nbformat.v4


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty checkout, on a machine without an accelerator."""
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    monkeypatch.setattr(notebook, "find_root", lambda: tmp_path)
    (tmp_path / "notebooks" / "in_depth").mkdir(parents=True)
    return tmp_path


def save(root, name, *sources):
    cells = [new.new_markdown_cell("# Title"), *(new.new_code_cell(source) for source in sources)]
    nbformat.write(new.new_notebook(cells=cells), root / "notebooks" / "in_depth" / f"{name}.ipynb")


def made_record(notebook, peak):
    return record(notebook, "a", [variant(peak=peak)])


def commit_results(root, *records):
    results.write(root / "results" / "cpu.json", results_file(*records))


# measure ------------------------------------------------------------------------------------------


def outcome(root, name, peak=None, **more):
    kept = [] if peak is None else [made_record(name, peak)]
    return run.Outcome(root / "notebooks" / "in_depth" / f"{name}.ipynb", 1.0, kept, **more)


def test_measure_prints_this_machines_numbers_beside_the_committed_ones(root, monkeypatch, capsys):
    for name in ("00_a", "01_b"):
        save(root, name)
    commit_results(root, made_record("00_a", 1024))
    asked = {}

    def ran(paths, **options):
        asked.update(options, names=[path.stem for path in paths])
        commit_results(
            root, made_record("00_a", 4096)
        )  # as a run in place does: the old ones must be shown
        return [outcome(root, path.stem, 2048) for path in paths]

    monkeypatch.setattr(run, "run", ran)
    assert commands.main(["measure", "--in-place"]) == 0
    usual = {"root": root, "cells": None, "timeout": 600}
    assert asked == {"names": ["00_a", "01_b"], "in_place": True, "output": None, **usual}
    printed = capsys.readouterr().out
    assert re.search(r"00_a +before +- +2\.00 KiB .* 1\.00 KiB\n", printed)
    assert re.search(r"01_b +before +- +2\.00 KiB .* -\n", printed)
    assert "2 notebooks in 2 s, 0 failed" in printed

    assert commands.main(["measure", "1", "--output", "elsewhere"]) == 0
    assert asked == {"names": ["01_b"], "in_place": False, "output": Path("elsewhere"), **usual}

    assert commands.main(["measure", "0", "--cells", "large", "--timeout", "36000"]) == 0
    asked_for = {"root": root, "cells": "large", "timeout": 36000}
    assert asked == {"names": ["00_a"], "in_place": False, "output": None, **asked_for}


def test_measure_compares_the_large_scale_with_its_own_file(root, monkeypatch, capsys):
    save(root, "00_a")
    commit_results(root, made_record("00_a", 1024))
    (root / "results" / "cpu.json").rename(root / "results" / "cpu-large.json")
    commit_results(root, made_record("00_a", 4096))
    monkeypatch.setattr(run, "run", lambda paths, **options: [outcome(root, "00_a", 2048)])
    for scale_name, committed in (("large", "1.00 KiB"), ("cpu", "4.00 KiB")):
        monkeypatch.setenv("MEMLAB_SCALE", scale_name)
        assert commands.main(["measure"]) == 0
        assert re.search(rf"00_a +before +- +2\.00 KiB .* {committed}\n", capsys.readouterr().out)


def test_measure_fails_when_a_notebook_does(root, monkeypatch, capsys):
    for name in ("00_a", "01_b"):
        save(root, name)
    ends = [outcome(root, "00_a", error="ValueError: no", cell=3), outcome(root, "01_b", 2048)]
    monkeypatch.setattr(run, "run", lambda paths, **options: ends)
    assert commands.main(["measure"]) == 1
    printed = capsys.readouterr().out
    assert "1 failed" in printed and "00_a.ipynb, cell [3]: ValueError: no" in printed
    assert re.search(r"01_b +before +- +2\.00 KiB", printed)


def test_measure_without_notebooks_or_with_an_unknown_one(root, monkeypatch, capsys):
    monkeypatch.setattr(run, "run", lambda *a, **k: pytest.fail("nothing may run"))
    assert commands.main(["measure"]) == 1
    assert "there are no notebooks" in capsys.readouterr().err
    save(root, "00_a")
    assert commands.main(["measure", "7"]) == 2
    assert (
        capsys.readouterr().err
        == "python -m memlab measure: '7' is no notebook. There are:\n  00_a\n"
    )


def test_measure_without_nbclient_says_what_to_install(root, monkeypatch, capsys):
    save(root, "00_a")
    monkeypatch.setitem(sys.modules, "nbclient", None)
    assert commands.main(["measure"]) == 2
    assert "pip install 'memlab[course]'" in capsys.readouterr().err


def test_measure_is_interrupted_without_a_traceback(root, monkeypatch, capsys):
    save(root, "00_a")

    def ran(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", ran)
    assert commands.main(["measure"]) == 130


def test_the_command_runs_in_a_checkout_that_is_not_installed(tmp_path):
    checkout = tmp_path / "checkout"
    package = Path(memlab.__file__).parent
    (checkout / "notebooks" / "in_depth").mkdir(parents=True)
    (checkout / "memlab").symlink_to(package)
    save(
        checkout,
        "00_a",
        "import importlib.util\nassert importlib.util.find_spec('memlab')",
        "1 / 0",
    )
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "MEMLAB_SCALE": "cpu", "PYTHONPATH": path}
    asked = [
        sys.executable,
        "-m",
        "memlab",
        "measure",
        str(checkout / "notebooks" / "in_depth" / "00_a.ipynb"),
        "--output",
        "out",
    ]
    ended = subprocess.run(
        asked, cwd=checkout, env=environment, capture_output=True, text=True, timeout=12000
    )
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr == ""  # no bar where nobody sees it, no log, no warning
    assert "00_a.ipynb, cell [2]: ZeroDivisionError: division by zero" in ended.stdout
    assert (checkout / "out" / "notebooks" / "00_a.ipynb").is_file()


@pytest.mark.parametrize(
    "arguments",
    [[], ["measur"], ["measure", "--nonsense"], ["measure", "--timeout", "long"], ["report", "x"]],
)
def test_a_wrong_call_is_told(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(arguments)
    assert end.value.code == 2
    assert "usage: python -m memlab" in capsys.readouterr().err


# report -------------------------------------------------------------------------------------------


def test_report_writes_and_checks(root, capsys):
    save(root, "00_a")
    commit_results(root, made_record("00_a", 1024))
    assert commands.main(["report"]) == 2
    assert "there is no README.md" in capsys.readouterr().err

    for document, names in documents.DOCUMENTS.items():
        blocks = [f"<!-- memlab:{name}:begin -->\n<!-- memlab:{name}:end -->\n" for name in names]
        (root / document).write_text("".join(blocks))
    assert commands.main(["report", "--check"]) == 1
    assert "+| 00_a | before | - | 1.00 KiB" in capsys.readouterr().out
    assert commands.main(["report"]) == 0
    assert (
        capsys.readouterr().out
        == "written: README.md\nwritten: CHEATSHEET.md\nwritten: results/README.md\n"
    )
    assert commands.main(["report", "--check"]) == 0
    assert commands.main(["report"]) == 0
    assert "everything is as the records say" in capsys.readouterr().out
