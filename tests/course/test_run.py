"""The runner, on small notebooks that stand in for the course's."""

import io
import signal
import sys
import threading
from pathlib import Path

import nbformat
import pytest

from memlab import results
from memlab.course.notebook import source_hash
from memlab.course.run import run, summary
from tests.records import ENVIRONMENT, record, results_file, variant

new = nbformat.v4


def code(source, *tags):
    return new.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def save(path, *cells, **metadata):
    notebook = new.new_notebook(cells=[new.new_markdown_cell("# Title"), *cells], metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def made_record(notebook, technique="x", peak=1000, environment=ENVIRONMENT):
    """A record of one variant."""
    return record(notebook, technique, [variant(peak=peak)], environment)


def recording(*arguments, tags=(), **more):
    """A cell that records without importing memlab, which is what takes the time."""
    line = made_record(*arguments, **more).model_dump_json() + "\n"
    to_file = "open(os.environ['MEMLAB_RECORDS'], 'a')"
    return code(f"import os\nwith {to_file} as file:\n    file.write({line!r})", *tags)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    (tmp_path / "notebooks" / "in_depth").mkdir(parents=True)
    return tmp_path


def contents(root, *, besides):
    """Every file below `root`, except in one folder."""
    files = (path for path in root.rglob("*") if path.is_file() and besides not in path.parents)
    return {path.relative_to(root): path.read_bytes() for path in files}


def peaks(file):
    return [kept.variants[0].peak_bytes for kept in results.load(file).records]


def outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    return [
        "".join(o.get("text", "") for o in cell.outputs)
        for cell in cells
        if cell.cell_type == "code"
    ]


# Running ------------------------------------------------------------------------------------------

REAL = """
import torch
from memlab import measure
from memlab.compare import compare
from memlab.results import record
def build():
    kept = torch.zeros(1000)
    return lambda: torch.zeros(2000) is kept
compared = compare(measure(build, device="cpu"))
record(compared, notebook="00_real", technique="real", sizes={"numbers": 1000})
"""


def test_a_failing_notebook_does_not_stop_the_others(root, capsys):
    folder = root / "notebooks" / "in_depth"
    (folder / "local.py").write_text("value = 7\n")
    paths = [
        save(
            folder / "00_real.ipynb",
            code(REAL),
            kernelspec={"name": "no-such-kernel", "display_name": "x"},
        ),
        save(
            folder / "01_fails.ipynb",
            code("print('before')"),
            recording("01_fails"),
            code("1 / 0"),
            code("print('after')"),
        ),
        save(
            folder / "electives" / "12_y.ipynb",
            code("1 / 0", "raises-exception"),
            code("import sys, os\nprint(sys.executable)\nprint(os.getcwd())"),
            code("sys.path.insert(0, '..')\nimport local\nprint(local.value)"),
            recording("12_y"),
        ),
    ]
    before = contents(root, besides=root / "build")
    outcomes = run(paths, root=root)

    assert contents(root, besides=root / "build") == before, "the checkout stays clean"
    real, fails, elective = outcomes
    assert [o.failed for o in outcomes] == [False, True, False]
    assert (fails.cell, fails.error) == (3, "ZeroDivisionError: division by zero")
    assert fails.records == []
    assert all(o.seconds > 0 for o in outcomes)

    # Copies, with the outputs as far as they went; each in its folder, by this Python.
    assert fails.copy == root / "build/notebooks/in_depth/01_fails.ipynb"
    assert outputs(fails.copy) == ["before\n", "", "", ""]
    copy = root / "build/notebooks/in_depth/electives/12_y.ipynb"
    assert outputs(copy)[1].splitlines() == [sys.executable, str((folder / "electives").resolve())]
    assert outputs(copy)[2] == "7\n"
    shown = nbformat.read(real.copy, as_version=4).cells[1].outputs
    assert [o["data"]["text/plain"] for o in shown] == ["recorded: 1 variant of real"]

    data = results.load(root / "build/results/cpu.json")
    assert [kept.notebook for kept in data.records] == ["00_real", "12_y"]
    assert data.records[0].variants[0].peak_bytes == 4000 + 8000
    assert data.environment.device == "cpu"

    printed = capsys.readouterr().out
    assert (
        "01_fails" in printed
        and "FAILED in cell [3]: ZeroDivisionError: division by zero" in printed
    )
    assert printed.count(" s  ok\n") == 2
    assert summary(outcomes).splitlines()[1:] == [
        "  01_fails.ipynb, cell [3]: ZeroDivisionError: division by zero",
        f"    the copy with its outputs: {fails.copy}",
    ]

    # A second run starts afresh: what it did not run is not in its file.
    run(paths[2:], root=root)
    data = results.load(root / "build/results/cpu.json")
    assert [kept.notebook for kept in data.records] == ["12_y"]


def test_in_place_writes_notebooks_and_records(root):
    folder = root / "notebooks" / "in_depth"
    path = save(
        folder / "03_x.ipynb",
        code("print('hello')"),
        recording("03_x", peak=2000),
        memlab={"minutes": 5},
    )
    bad = save(
        folder / "04_bad.ipynb",
        recording("04_bad", peak=2000),
        code("raise ValueError('no\\nmore')"),
    )
    cell = nbformat.read(path, as_version=4)
    cell.metadata["widgets"] = {"state": 1}
    cell.cells[1].metadata["execution"] = {"iopub.execute_input": "2026"}
    nbformat.write(cell, path)
    ids = [each.id for each in cell.cells]
    of_then = results.environment(root, "cpu").model_copy(update={"date": "2020-01-01"})
    old = [made_record(name) for name in ("01_other", "03_x", "04_bad")]
    file = root / "results" / "cpu.json"
    results.write(file, results_file(*old, environment=of_then))
    bad_before = bad.read_bytes()

    good, failed = run([path, bad], in_place=True, root=root)
    assert (good.failed, good.copy) == (False, path)
    notebook = nbformat.read(path, as_version=4)
    assert outputs(path) == ["hello\n", ""]
    assert [c.execution_count for c in notebook.cells[1:]] == [1, 2]
    assert [c.id for c in notebook.cells] == ids
    assert "widgets" not in notebook.metadata and "version" not in notebook.metadata.language_info
    assert notebook.metadata.kernelspec.name == "python3"
    assert all("execution" not in c.metadata for c in notebook.cells)
    assert notebook.metadata.memlab == {"minutes": 5, "source_hash": source_hash(notebook)}

    assert (failed.cell, failed.error) == (2, "ValueError: no")
    assert bad.read_bytes() == bad_before
    assert failed.copy == root / "build/notebooks/in_depth/04_bad.ipynb"

    data = results.load(file)
    peaks = {kept.notebook: kept.variants[0].peak_bytes for kept in data.records}
    assert peaks == {"01_other": 1000, "03_x": 2000, "04_bad": 1000}
    dates = [kept.environment.date for kept in data.records]
    assert dates == ["2020-01-01", data.environment.date, "2020-01-01"]
    assert data.environment.date > "2020-01-01"

    # Run again, the notebook is the same to the byte.
    first = path.read_bytes()
    run([path], in_place=True, root=root)
    assert path.read_bytes() == first


def test_a_results_file_that_is_not_valid_is_found_before_anything_runs(root):
    path = save(root / "notebooks" / "in_depth" / "03_x.ipynb", code("print(1)"))
    (root / "results").mkdir()
    (root / "results" / "cpu.json").write_text("{}")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cpu.json is not a results file"):
        run([path], in_place=True, root=root)
    assert path.read_bytes() == before


def test_each_way_to_fail_is_told(root):
    folder = root / "notebooks" / "in_depth"
    unreadable = folder / "03_unreadable.ipynb"
    unreadable.write_text("{")
    outcomes = run(
        [
            save(folder / "00_slow.ipynb", code("1"), code("import time; time.sleep(60)")),
            save(folder / "01_dies.ipynb", code("import os; os._exit(9)"), code("1")),
            save(folder / "02_alias.ipynb", recording("03_x")),
            unreadable,
            folder / "04_missing.ipynb",
        ],
        root=root,
        timeout=10,  # a busy machine needs seconds for the other cells
    )
    errors = [(o.cell, o.error) for o in outcomes]
    assert errors[0] == (2, "took longer than 10 s")
    assert errors[1] == (1, "the kernel died (out of memory?)")
    assert errors[2] == (None, "it records under another notebook's name: 03_x")
    assert errors[3][0] is None and errors[3][1].startswith("cannot be read: ")
    assert errors[4][0] is None and "No such file" in errors[4][1]
    assert not (root / "build/results/cpu.json").exists()
    assert len(summary(outcomes).splitlines()) == 1 + 5 + 3  # three of them have copies


def test_control_c_ends_the_whole_run(root):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals arrive in the main thread, and this is another")
    folder = root / "notebooks" / "in_depth"
    first = save(
        folder / "00_a.ipynb",
        code("import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"),
    )
    second = save(folder / "01_b.ipynb", code("open('ran', 'w')"))
    before = contents(root, besides=root / "build")
    with pytest.raises(KeyboardInterrupt):
        run([first, second], root=root)
    assert contents(root, besides=root / "build") == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def at_a_terminal(monkeypatch):
    """What the progress bar writes where somebody sees it."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    return terminal


def test_the_progress_bar_names_notebook_and_cell(root, monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    run([save(root / "notebooks" / "in_depth" / "00_a.ipynb", code("1"), code("2"))], root=root)
    shown = terminal.getvalue()
    assert "00_a [1]" in shown and "00_a [2]" in shown and "0/2" in shown


def test_what_a_cell_prints_is_shown_beside_the_bar(root, monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    cells = [code("print('first line\\nrung 3 of 14')"), code("print(' ')\nprint('x' * 200)")]
    (outcome,) = run([save(root / "notebooks" / "in_depth" / "00_a.ipynb", *cells)], root=root)
    shown = terminal.getvalue()
    assert "rung 3 of 14" in shown and "first line" not in shown  # the last line that is not empty
    assert "x" * 80 in shown and "x" * 81 not in shown
    assert outputs(outcome.copy) == ["first line\nrung 3 of 14\n", f" \n{'x' * 200}\n"]


# A part of a notebook -----------------------------------------------------------------------------


@pytest.fixture
def tagged(root):
    """A notebook with three tagged cells of code; of the others one would fail, and one would
    record.
    """
    return save(
        root / "notebooks" / "in_depth" / "03_x.ipynb",
        code("1 / 0", "exercise"),
        code("order = ['first']\nprint(*order)", "large"),
        new.new_markdown_cell("Words.", metadata={"tags": ["large"]}),
        code("order.append('not tagged')"),
        code("order.append('second')\nprint(*order)", "other", "large"),
        recording("03_x", peak=1, technique="other"),
        recording("03_x", peak=3000, tags=["large"]),
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_only_the_tagged_cells_run_and_the_notebook_stays_as_it_is(root, tagged, in_place):
    before = contents(root, besides=root / "build")
    (outcome,) = run([tagged], root=root, cells="large", in_place=in_place)
    assert not outcome.failed
    assert outcome.copy == root / "build/notebooks/in_depth/03_x.ipynb"
    assert outputs(outcome.copy) == ["first\n", "first second\n", ""]
    file = Path("results/cpu.json") if in_place else Path("build/results/cpu.json")
    assert peaks(root / file) == [3000]
    after = contents(root, besides=root / "build")
    assert (after.pop(Path("results/cpu.json"), None) is not None) == in_place
    assert after == before


def test_the_records_of_the_large_scale_go_to_a_file_of_their_own(root, tagged, monkeypatch):
    monkeypatch.setenv("MEMLAB_SCALE", "large")
    run([tagged], root=root, cells="large", in_place=True)
    assert [path.name for path in (root / "results").iterdir()] == ["cpu-large.json"]


def test_a_tagged_cell_that_fails_is_told_and_leaves_no_record(root, capsys):
    path = save(
        root / "notebooks" / "in_depth" / "03_x.ipynb", recording("03_x"), code("missing", "large")
    )
    (outcome,) = run([path], root=root, cells="large", in_place=True)
    assert (outcome.cell, outcome.error) == (1, "NameError: name 'missing' is not defined")
    assert not (root / "results").exists()


def test_a_notebook_without_the_tag_is_told_and_does_not_stop_the_others(root, tagged, capsys):
    plain = save(
        root / "notebooks" / "in_depth" / "01_plain.ipynb", code("print(1)"), recording("01_plain")
    )
    before = plain.read_bytes()
    for in_place in (False, True):
        without, other = run([plain, tagged], root=root, cells="large", in_place=in_place)
        assert (without.failed, without.error, without.cell) == (
            True,
            "no code cell has the tag 'large'",
            None,
        )
        assert without.copy is None and not other.failed
    assert plain.read_bytes() == before
    assert "01_plain" in capsys.readouterr().out
    assert summary([without]).splitlines()[1:] == [
        "  01_plain.ipynb: no code cell has the tag 'large'"
    ]


def test_the_bar_counts_the_tagged_cells_only(root, tagged, monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    run([tagged], root=root, cells="large")
    assert (
        "0/3" in terminal.getvalue()
        and "03_x [3]" in terminal.getvalue()
        and "/6" not in terminal.getvalue()
    )


def test_without_nbclient_it_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "nbclient", None)
    with pytest.raises(ModuleNotFoundError, match=r"nbclient is not installed.*memlab\[course\]"):
        run([], root=root)


def test_records_of_another_device_do_not_go_to_this_ones_file(root, capsys):
    """With one GPU notebook 05 runs on the CPU: that is no measurement of the GPU."""
    of_gpu = ENVIRONMENT.model_copy(update={"device": "cuda"})
    cells = [recording("03_x", environment=of_gpu), recording("03_x", peak=2000)]
    run([save(root / "notebooks" / "in_depth" / "03_x.ipynb", *cells)], in_place=True, root=root)
    assert peaks(root / "results" / "cpu.json") == [2000]
    assert "1 of its records are not about cpu" in "".join(capsys.readouterr())
