"""The commands, as a person calls them."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

import memlab
from memlab import __main__ as commands
from memlab import course, report, results
from memlab.ledger import COLUMNS
from memlab.workloads import gpt, scale

new = nbformat.v4


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty checkout, on a machine without an accelerator."""
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    monkeypatch.setattr(course, "find_root", lambda: tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def save(root, name, *sources):
    cells = [new.new_markdown_cell("# Title"), *(new.new_code_cell(source) for source in sources)]
    nbformat.write(new.new_notebook(cells=cells), root / "notebooks" / f"{name}.ipynb")


def made_record(notebook, peak):
    columns = dict.fromkeys(COLUMNS, 0) | {"parameters": peak}
    variant = dict.fromkeys(
        (
            "predicted_bytes",
            "reserved_bytes",
            "device_bytes",
            "seconds",
            "tokens_per_second",
            "loss",
            "max_gradient_difference",
        )
    )
    variant |= {"name": "before", "peak_bytes": peak, "columns": columns, "phase": "forward"}
    return {
        "notebook": notebook,
        "technique": "a",
        "scale": "cpu",
        "sizes": {"layers": 2},
        "variants": [variant],
    }


def commit_results(root, *records):
    environment = results.environment(root, "cpu")
    results.write(
        root / "results" / "cpu.json",
        {"schema": 1, "environment": environment, "records": list(records)},
    )


# measure ------------------------------------------------------------------------------------------


def outcome(root, name, peak=None, **more):
    lines = [] if peak is None else [{"environment": {}, "record": made_record(name, peak)}]
    return course.Outcome(root / "notebooks" / f"{name}.ipynb", 1.0, lines, **more)


def test_measure_prints_this_machines_numbers_beside_the_committed_ones(root, monkeypatch, capsys):
    for name in ("00_a", "01_b"):
        save(root, name)
    commit_results(root, made_record("00_a", 1024))
    asked = {}

    def run(paths, **options):
        asked.update(options, names=[path.stem for path in paths])
        commit_results(
            root, made_record("00_a", 4096)
        )  # as a run in place does: the old ones must be shown
        return [outcome(root, path.stem, 2048) for path in paths]

    monkeypatch.setattr(course, "run", run)
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
    monkeypatch.setattr(course, "run", lambda paths, **options: [outcome(root, "00_a", 2048)])
    for scale_name, committed in (("large", "1.00 KiB"), ("cpu", "4.00 KiB")):
        monkeypatch.setenv("MEMLAB_SCALE", scale_name)
        assert commands.main(["measure"]) == 0
        assert re.search(rf"00_a +before +- +2\.00 KiB .* {committed}\n", capsys.readouterr().out)


def test_measure_fails_when_a_notebook_does(root, monkeypatch, capsys):
    for name in ("00_a", "01_b"):
        save(root, name)
    ends = [outcome(root, "00_a", error="ValueError: no", cell=3), outcome(root, "01_b", 2048)]
    monkeypatch.setattr(course, "run", lambda paths, **options: ends)
    assert commands.main(["measure"]) == 1
    printed = capsys.readouterr().out
    assert "1 failed" in printed and "00_a.ipynb, cell [3]: ValueError: no" in printed
    assert re.search(r"01_b +before +- +2\.00 KiB", printed)


def test_measure_without_notebooks_or_with_an_unknown_one(root, monkeypatch, capsys):
    monkeypatch.setattr(course, "run", lambda *a, **k: pytest.fail("nothing may run"))
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

    def run(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "run", run)
    assert commands.main(["measure"]) == 130


def test_the_command_runs_in_a_checkout_that_is_not_installed(tmp_path):
    checkout = tmp_path / "checkout"
    package = Path(memlab.__file__).parent
    (checkout / "notebooks").mkdir(parents=True)
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
        str(checkout / "notebooks" / "00_a.ipynb"),
        "--output",
        "out",
    ]
    ended = subprocess.run(
        asked, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120
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

    for document, names in report.DOCUMENTS.items():
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


# doctor -------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A GPT whose step takes milliseconds."""
    sizes = dataclasses.replace(scale("cpu"), gpt=gpt.tiny(layers=1), sequence_length=16)
    monkeypatch.setattr(commands, "scale", lambda: sizes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many threads in a small step wait for one another
    yield
    torch.set_num_threads(threads)


def test_doctor_says_what_this_machine_is(small, capsys):
    assert commands.run_doctor(step_seconds=0.0001, repeats=2) == 0
    printed = capsys.readouterr().out
    for expected in (
        rf"^memlab +{re.escape(memlab.__version__)}, commit ",
        rf"^python +3\.\d+\.\d+, torch {re.escape(torch.__version__)}, \d+ threads$",
        r"^device +cpu$",
        r"^free memory +[\d.]+ GiB of [\d.]+ GiB$",
        r"^scale +cpu on cpu: ",
        r"^BF16 +(native|emulated|none)$",
        r"^meter +OK: 8,388,616 bytes allocated, 8,388,616 bytes measured$",
        (
            r"^ +[\d.]+ x: a step takes [\d.]+ s with the meter, [\d.]+ s without \(the fastest of"
            r" 2 each; batch 8 x 16\)"
        ),
    ):
        assert re.search(expected, printed, flags=re.MULTILINE), (expected, printed)


def test_doctor_fails_when_the_meter_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    right = memlab.measure

    def wrong(*arguments, **options):
        return dataclasses.replace(right(*arguments, **options), peak_bytes=8388617)

    monkeypatch.setattr(memlab, "measure", wrong)
    monkeypatch.setattr(commands, "overhead", lambda *arguments: "-")
    assert commands.run_doctor() == 1
    assert "WRONG: 8,388,616 bytes allocated, 8,388,617 bytes measured" in capsys.readouterr().out


def test_doctor_works_where_packages_are_missing(monkeypatch, capsys):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    monkeypatch.setattr(
        commands, "find_spec", lambda name: None if name in ("sklearn", "nbclient") else True
    )
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(commands, "overhead", lambda *arguments: "-")
    assert commands.run_doctor() == 0
    printed = capsys.readouterr().out
    assert "free memory  not known (psutil is not installed)" in printed
    assert (
        "missing      nbclient (runs the notebooks), sklearn (the real images (scikit-learn)): "
        "pip install 'memlab[course]'" in printed
    )


def clock(monkeypatch, *seconds):
    """A clock by which the steps take these seconds, one after the other; the meter, before the
    last two, half of one.
    """
    ticks, now = [], 0.0
    for number, each in enumerate(seconds):
        if number == len(seconds) - 2:
            ticks.append(now)
            now += 0.5
        ticks += [now, now + each]
        now += each
    monkeypatch.setattr(commands.time, "perf_counter", lambda: ticks.pop(0) if ticks else now)


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        # A warm-up, two to find the batch (8, then 20), the steps without the meter, those with it.
        (
            (9, 0.4, 1.0, 1.0, 1.1, 1.2, 1.3),
            r"^1\.20 x: a step takes 1\.200 s with .* 1\.000 s without .*batch 20 x 16",
        ),
        ((9, 0.4, 1.0, 1.0, 1.1, 1.4, 1.25), r"^1\.25 x: (?!.*(Not to be|That is|This step))"),
        ((9, 0.4, 1.0, 1.0, 1.1, 1.4, 1.4), r"^1\.40 x: .*That is more than the 1\.3 x"),
        (
            (9, 0.4, 1.0, 1.0, 1.5, 1.4, 1.4),
            r"Not to be relied on: the steps took 1\.000 to 1\.500 s without",
        ),
        (
            (9, 0.4, 1.0, 1.0, 1.1, 0.8, 0.9),
            r"^0\.80 x: .*Not to be relied on: .*, 0\.800 to 0\.900 s with it",
        ),
        # The batch stops at 128 sequences, however fast the machine is.
        ((9, 0.01, 0.2, 0.2, 0.2, 0.2, 0.2), r"^1\.00 x: .*batch 128 x 16.*This step is short"),
    ],
)
def test_the_overhead_in_words(small, monkeypatch, seconds, found):
    clock(monkeypatch, *seconds)
    text = commands.overhead(step_seconds=1.0, repeats=2)
    assert re.search(found, text, flags=re.DOTALL), text
    assert "Beside the steps, 0.5 s to begin and to read" in text
