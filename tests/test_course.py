"""The runner, on small notebooks that stand in for the course's."""

import io
import json
import signal
import sys
import threading
from pathlib import Path

import nbformat
import pytest

from memlab import course, results
from memlab.ledger import COLUMNS

new = nbformat.v4


def code(source, *tags):
    return new.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def save(path, *cells, **metadata):
    notebook = new.new_notebook(cells=[new.new_markdown_cell("# Title"), *cells], metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def made_record(notebook, technique="x", peak=1000, **more):
    """A record of one variant, and the line that `results.record` would append for it."""
    variant = dict.fromkeys(
        (
            "name",
            "predicted_bytes",
            "peak_bytes",
            "columns",
            "phase",
            "reserved_bytes",
            "device_bytes",
            "seconds",
            "tokens_per_second",
            "loss",
            "max_gradient_difference",
        )
    )
    columns = dict.fromkeys(COLUMNS, 0) | {"parameters": peak}
    variant |= {
        "name": "before",
        "peak_bytes": peak,
        "columns": columns,
        "phase": "forward",
        **more,
    }
    return {
        "notebook": notebook,
        "technique": technique,
        "scale": "cpu",
        "sizes": {"layers": 2},
        "variants": [variant],
    }


def recording(notebook, **more):
    """A cell that records without importing memlab, which is what takes the time."""
    line = json.dumps(
        {"environment": {"device": "cpu", "threads": 2}, "record": made_record(notebook, **more)}
    )
    return code(
        "import os\nwith open(os.environ['MEMLAB_RECORDS'], 'a') as file:\n   "
        f" file.write({line + chr(10)!r})"
    )


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def contents(root, *, besides):
    """Every file below `root`, except in one folder."""
    files = (path for path in root.rglob("*") if path.is_file() and besides not in path.parents)
    return {path.relative_to(root): path.read_bytes() for path in files}


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
    folder = root / "notebooks"
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
    outcomes = course.run(paths, root=root)

    assert contents(root, besides=root / "build") == before, "the checkout stays clean"
    real, fails, elective = outcomes
    assert [o.failed for o in outcomes] == [False, True, False]
    assert (fails.cell, fails.error) == (3, "ZeroDivisionError: division by zero")
    assert fails.records == []
    assert all(o.seconds > 0 for o in outcomes)

    # Copies, with the outputs as far as they went; each in its folder, by this Python.
    assert fails.copy == root / "build/notebooks/01_fails.ipynb"
    assert outputs(fails.copy) == ["before\n", "", "", ""]
    copy = root / "build/notebooks/electives/12_y.ipynb"
    assert outputs(copy)[1].splitlines() == [sys.executable, str((folder / "electives").resolve())]
    assert outputs(copy)[2] == "7\n"
    shown = nbformat.read(real.copy, as_version=4).cells[1].outputs
    assert [o["data"]["text/plain"] for o in shown] == ["recorded: 1 variant of real"]

    data = results.load(root / "build/results/cpu.json")
    assert [one["notebook"] for one in data["records"]] == ["00_real", "12_y"]
    assert data["records"][0]["variants"][0]["peak_bytes"] == 4000 + 8000
    assert data["environment"]["device"] == "cpu"

    printed = capsys.readouterr().out
    assert (
        "01_fails" in printed
        and "FAILED in cell [3]: ZeroDivisionError: division by zero" in printed
    )
    assert printed.count(" s  ok\n") == 2
    assert course.summary(outcomes).splitlines()[1:] == [
        "  01_fails.ipynb, cell [3]: ZeroDivisionError: division by zero",
        f"    the copy with its outputs: {fails.copy}",
    ]

    # A second run starts afresh: what it did not run is not in its file.
    course.run(paths[2:], root=root)
    assert [
        one["notebook"] for one in results.load(root / "build/results/cpu.json")["records"]
    ] == ["12_y"]


def test_in_place_writes_notebooks_and_records(root):
    folder = root / "notebooks"
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
    environment = results.environment(root, "cpu") | {"date": "2020-01-01"}
    old = [made_record(name) for name in ("01_other", "03_x", "04_bad")]
    file = root / "results" / "cpu.json"
    results.write(file, {"schema": 1, "environment": environment, "records": old})
    bad_before = bad.read_bytes()

    good, failed = course.run([path, bad], in_place=True, root=root)
    assert (good.failed, good.copy) == (False, path)
    notebook = nbformat.read(path, as_version=4)
    assert outputs(path) == ["hello\n", ""]
    assert [c.execution_count for c in notebook.cells[1:]] == [1, 2]
    assert [c.id for c in notebook.cells] == ids
    assert "widgets" not in notebook.metadata and "version" not in notebook.metadata.language_info
    assert notebook.metadata.kernelspec.name == "python3"
    assert all("execution" not in c.metadata for c in notebook.cells)
    assert notebook.metadata.memlab == {"minutes": 5, "source_hash": course.source_hash(notebook)}

    assert (failed.cell, failed.error) == (2, "ValueError: no")
    assert bad.read_bytes() == bad_before
    assert failed.copy == root / "build/notebooks/04_bad.ipynb"

    data = results.load(file)
    peaks = {one["notebook"]: one["variants"][0]["peak_bytes"] for one in data["records"]}
    assert peaks == {"01_other": 1000, "03_x": 2000, "04_bad": 1000}
    dates = [results.environment_of(data, one)["date"] for one in data["records"]]
    assert dates == ["2020-01-01", data["environment"]["date"], "2020-01-01"]
    assert data["environment"]["date"] > "2020-01-01"

    # Run again, the notebook is the same to the byte.
    first = path.read_bytes()
    course.run([path], in_place=True, root=root)
    assert path.read_bytes() == first


def test_a_results_file_that_is_not_valid_is_found_before_anything_runs(root):
    path = save(root / "notebooks" / "03_x.ipynb", code("print(1)"))
    (root / "results").mkdir()
    (root / "results" / "cpu.json").write_text("{}")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cpu.json is not a results file"):
        course.run([path], in_place=True, root=root)
    assert path.read_bytes() == before


def test_each_way_to_fail_is_told(root):
    folder = root / "notebooks"
    unreadable = folder / "03_unreadable.ipynb"
    unreadable.write_text("{")
    outcomes = course.run(
        [
            save(folder / "00_slow.ipynb", code("1"), code("import time; time.sleep(60)")),
            save(folder / "01_dies.ipynb", code("import os; os._exit(9)"), code("1")),
            save(folder / "02_alias.ipynb", recording("03_x")),
            unreadable,
            folder / "04_missing.ipynb",
        ],
        root=root,
        timeout=2,
    )
    errors = [(o.cell, o.error) for o in outcomes]
    assert errors[0] == (2, "took longer than 2 s")
    assert errors[1] == (1, "the kernel died (out of memory?)")
    assert errors[2] == (None, "it records under another notebook's name: 03_x")
    assert errors[3][0] is None and errors[3][1].startswith("cannot be read: ")
    assert errors[4][0] is None and "No such file" in errors[4][1]
    assert not (root / "build/results/cpu.json").exists()
    assert len(course.summary(outcomes).splitlines()) == 1 + 5 + 3  # three of them have copies


def test_control_c_ends_the_whole_run(root):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals arrive in the main thread, and this is another")
    folder = root / "notebooks"
    first = save(
        folder / "00_a.ipynb",
        code("import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"),
    )
    second = save(folder / "01_b.ipynb", code("open('ran', 'w')"))
    before = contents(root, besides=root / "build")
    with pytest.raises(KeyboardInterrupt):
        course.run([first, second], root=root)
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
    course.run([save(root / "notebooks" / "00_a.ipynb", code("1"), code("2"))], root=root)
    shown = terminal.getvalue()
    assert "00_a [1]" in shown and "00_a [2]" in shown and "0/2" in shown


def test_what_a_cell_prints_is_shown_beside_the_bar(root, monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    cells = [code("print('first line\\nrung 3 of 14')"), code("print(' ')\nprint('x' * 200)")]
    (outcome,) = course.run([save(root / "notebooks" / "00_a.ipynb", *cells)], root=root)
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
        root / "notebooks" / "03_x.ipynb",
        code("1 / 0", "exercise"),
        code("order = ['first']\nprint(*order)", "large"),
        new.new_markdown_cell("Words.", metadata={"tags": ["large"]}),
        code("order.append('not tagged')"),
        code("order.append('second')\nprint(*order)", "other", "large"),
        recording("03_x", peak=1, technique="other"),
        code(recording("03_x", peak=3000).source, "large"),
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_only_the_tagged_cells_run_and_the_notebook_stays_as_it_is(root, tagged, in_place):
    before = contents(root, besides=root / "build")
    (outcome,) = course.run([tagged], root=root, cells="large", in_place=in_place)
    assert not outcome.failed
    assert outcome.copy == root / "build/notebooks/03_x.ipynb"
    assert outputs(outcome.copy) == ["first\n", "first second\n", ""]
    file = Path("results/cpu.json") if in_place else Path("build/results/cpu.json")
    assert [one["variants"][0]["peak_bytes"] for one in results.load(root / file)["records"]] == [
        3000
    ]
    after = contents(root, besides=root / "build")
    assert (after.pop(Path("results/cpu.json"), None) is not None) == in_place
    assert after == before


def test_the_records_of_the_large_scale_go_to_a_file_of_their_own(root, tagged, monkeypatch):
    monkeypatch.setenv("MEMLAB_SCALE", "large")
    course.run([tagged], root=root, cells="large", in_place=True)
    assert [path.name for path in (root / "results").iterdir()] == ["cpu-large.json"]


def test_a_tagged_cell_that_fails_is_told_and_leaves_no_record(root, capsys):
    path = save(root / "notebooks" / "03_x.ipynb", recording("03_x"), code("missing", "large"))
    (outcome,) = course.run([path], root=root, cells="large", in_place=True)
    assert (outcome.cell, outcome.error) == (1, "NameError: name 'missing' is not defined")
    assert not (root / "results").exists()


def test_a_notebook_without_the_tag_is_told_and_does_not_stop_the_others(root, tagged, capsys):
    plain = save(root / "notebooks" / "01_plain.ipynb", code("print(1)"), recording("01_plain"))
    before = plain.read_bytes()
    for in_place in (False, True):
        without, other = course.run([plain, tagged], root=root, cells="large", in_place=in_place)
        assert (without.failed, without.error, without.cell) == (
            True,
            "no code cell has the tag 'large'",
            None,
        )
        assert without.copy is None and not other.failed
    assert plain.read_bytes() == before
    assert "01_plain" in capsys.readouterr().out
    assert course.summary([without]).splitlines()[1:] == [
        "  01_plain.ipynb: no code cell has the tag 'large'"
    ]


def test_the_bar_counts_the_tagged_cells_only(root, tagged, monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    course.run([tagged], root=root, cells="large")
    assert (
        "0/3" in terminal.getvalue()
        and "03_x [3]" in terminal.getvalue()
        and "/6" not in terminal.getvalue()
    )


def test_without_nbclient_it_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "nbclient", None)
    with pytest.raises(ModuleNotFoundError, match=r"nbclient is not installed.*memlab\[course\]"):
        course.run([], root=root)


# What notebooks are, and which --------------------------------------------------------------------


def test_the_source_hash_is_of_the_code_only(tmp_path):
    path = save(tmp_path / "a.ipynb", code("a = 1\nb = 2"), code("c"))
    notebook = nbformat.read(path, as_version=4)
    first = course.source_hash(notebook)
    assert course.source_hash(path) == course.source_hash(str(path)) == first
    notebook.cells[0].source = "# Another title"
    notebook.cells[1].outputs = [new.new_output("stream", text="out")]
    notebook.cells[1].execution_count = 3
    notebook.metadata["memlab"] = {"source_hash": first}
    assert course.source_hash(notebook) == first
    notebook.cells[1].source += " "
    assert course.source_hash(notebook) != first
    joined = save(tmp_path / "b.ipynb", code("a = 1\nb = 2c"))
    assert course.source_hash(joined) != first


def test_strip_removes_a_widget_and_keeps_what_stands_beside_it():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "VBox()"}
    shown = [
        new.new_output("display_data", data=dict(view)),
        new.new_output("display_data", data=view | {"image/png": "AAAA"}),
        new.new_output("display_data", data={"text/plain": "text"}),
        new.new_output("stream", text="printed"),
    ]
    notebook = new.new_notebook(
        cells=[new.new_code_cell("x", outputs=shown), new.new_markdown_cell("y")]
    )
    course.strip(notebook)
    kept = notebook.cells[0].outputs
    assert [sorted(o.get("data", {})) for o in kept] == [
        ["image/png", "text/plain"],
        ["text/plain"],
        [],
    ]
    assert kept[2].text == "printed"
    nbformat.validate(notebook)


@pytest.fixture
def names(tmp_path):
    for name in (
        "00_measuring_memory",
        "03_gradient_checkpointing",
        "04_gradient_accumulation",
        "10_fused_loss",
    ):
        save(tmp_path / "notebooks" / f"{name}.ipynb")
    save(tmp_path / "notebooks" / "electives" / "12_muon.ipynb")
    save(tmp_path / "notebooks" / ".ipynb_checkpoints" / "00_measuring_memory-checkpoint.ipynb")
    return tmp_path


def test_notebooks_are_in_order_core_then_electives(names):
    assert [path.stem.split("_")[0] for path in course.notebooks(names)] == [
        "00",
        "03",
        "04",
        "10",
        "12",
    ]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], ["00", "03", "04", "10", "12"]),
        (["03"], ["03"]),
        (["3", "0"], ["03", "00"]),
        (["10"], ["10"]),
        (["gradient_checkpointing", "03"], ["03"]),
        (["03_grad", "muon", "measuring"], ["03", "12", "00"]),
        (["00_measuring_memory.ipynb"], ["00"]),
        (["notebooks/04_gradient_accumulation.ipynb"], ["04"]),
    ],
)
def test_a_notebook_is_found_by_what_people_type(names, given, found, monkeypatch):
    monkeypatch.chdir(names)
    assert [path.stem.split("_")[0] for path in course.select(given, names)] == found


def test_a_notebook_is_found_by_its_path_from_anywhere(names, tmp_path):
    path = save(tmp_path / "elsewhere" / "mine.ipynb")
    assert course.select([str(path)], names) == [path]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "7",
            (
                "'7' is no notebook. There are:\n  00_measuring_memory\n "
                " 03_gradient_checkpointing\n  04_"
            ),
        ),
        ("1", "'1' is no notebook"),
        ("checkpointing", "'checkpointing' is no notebook"),
        (
            "gradient",
            (
                "'gradient' is the beginning of several notebooks. There match:\n "
                " 03_gradient_checkpointing\n  04"
            ),
        ),
        ("", "'' is no notebook"),
    ],
)
def test_an_unknown_notebook_lists_those_there_are(names, given, message):
    with pytest.raises(ValueError) as error:
        course.select([given], names)
    assert str(error.value).startswith(message)


def test_the_root_is_this_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert course.find_root() == Path(course.__file__).resolve().parents[1]


def test_the_root_of_an_installed_memlab_is_the_checkout_one_stands_in(monkeypatch, tmp_path):
    monkeypatch.setattr(
        course, "__file__", str(tmp_path / "site-packages" / "memlab" / "course.py")
    )
    checkout = tmp_path / "checkout"
    (checkout / "memlab").mkdir(parents=True)
    (checkout / "memlab" / "course.py").touch()
    (checkout / "notebooks").mkdir()
    monkeypatch.chdir(checkout / "notebooks")
    assert course.find_root() == checkout
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="memlab is installed without them"):
        course.find_root()


# The table ----------------------------------------------------------------------------------------


def test_the_table_sets_the_committed_numbers_beside_this_runs():
    seconds = {"median": 0.25, "spread": 0.01, "repeats": 3}
    records = [
        made_record("00_a", "a", peak=2048, predicted_bytes=2000, seconds=seconds),
        made_record("00_a", "a", peak=4096),
        made_record("01_b", "b"),
        made_record("02_c", "c"),
    ]
    committed = {
        "records": [
            made_record("00_a", "a", peak=1024),
            made_record("01_b", "b") | {"sizes": {"layers": 3}},
        ]
    }
    lines = course.table(records, committed).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "notebook variant predicted measured residual × less seconds (spread) committed",
        "00_a before 1.95 KiB 2.00 KiB +2.40 % 1.00 0.25 (0.01) 1.00 KiB",
        "00_a before - 4.00 KiB - 1.00 - -",
        "01_b before - 1,000 B - 1.00 - other sizes",
        "02_c before - 1,000 B - 1.00 - -",
    ]
    assert len({len(line) for line in lines}) == 1, "the last column ends at one place"
    assert "committed" in course.table(records)
    assert course.table([]) == "Nothing was recorded."


def test_records_of_another_device_do_not_go_to_this_ones_file(root, capsys):
    """With one GPU notebook 05 runs on the CPU: that is no measurement of the GPU."""
    line = json.dumps({"environment": {"device": "cuda"}, "record": made_record("03_x")})
    source = (
        "import os\nwith open(os.environ['MEMLAB_RECORDS'], 'a') as file:\n   "
        f" file.write({line + chr(10)!r})"
    )
    path = save(root / "notebooks" / "03_x.ipynb", code(source), recording("03_x", peak=2000))
    course.run([path], in_place=True, root=root)
    data = results.load(root / "results" / "cpu.json")
    assert [one["variants"][0]["peak_bytes"] for one in data["records"]] == [2000]
    assert "1 of its records are not about cpu" in "".join(capsys.readouterr())


def test_a_kernel_that_dies_is_told_also_when_nbclient_stumbles_over_it(root, monkeypatch):
    """Tidying up after it, nbclient can fail with an assertion of its own."""
    nbclient = pytest.importorskip("nbclient")

    def execute(self, **_):
        try:
            raise nbclient.exceptions.DeadKernelError("Kernel died")
        finally:
            assert not self.nb, "nbclient's"  # raised while the other error is handled

    monkeypatch.setattr(nbclient.NotebookClient, "execute", execute)
    path = save(root / "notebooks" / "03_x.ipynb", code("1"))
    (outcome,) = course.run([path], root=root)
    assert outcome.error == "the kernel died (out of memory?)"
