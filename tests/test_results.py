"""Records, results files and the tables made from them."""

import base64
import copy
import json
import math
import re
import subprocess

import pytest

from memlab import results
from memlab.compare import compare
from memlab.ledger import COLUMNS, Ledger
from memlab.measure import Measurement, Seconds
from memlab.measure import environment as measured_environment
from memlab.units import MiB


def measurement(parameters=MiB, activations=3 * MiB, **more):
    columns = dict.fromkeys(COLUMNS, 0) | {"parameters": parameters, "activations": activations}
    more = {"environment": measured_environment("cpu"), **more}
    return Measurement(sum(columns.values()), columns, "backward", Ledger([]), **more)


def comparison(**more):
    before = measurement(seconds=Seconds(0.5, 0.0123456789, 3), losses=(3.0, 2.5), **more)
    return compare(before, measurement(activations=MiB, **more), predicted=[4 * MiB, 2 * MiB + 20972])


def record(notebook="03_x", technique="x", sizes=None, **more):
    more = {"scale": "cpu", **more}
    return results.record(comparison(), notebook=notebook, technique=technique, sizes=sizes or {"layers": 2}, **more)


ENVIRONMENT = {
    "device": "cpu", "gpu": None, "gpu_bytes": None, "torch": "2.13.0", "driver": None, "python": "3.11.7", "threads": 2,
    "commit": "0" * 40, "date": "2026-01-31",
}  # fmt: skip
GPU = ENVIRONMENT | {"device": "cuda", "gpu": "NVIDIA H200", "gpu_bytes": 140 * 2**30, "driver": "575.1"}


def lines(*records, **environment):
    return [{"environment": ENVIRONMENT | environment, "record": one} for one in records]


def results_file(*records, environment=ENVIRONMENT):
    return {"schema": results.SCHEMA, "environment": dict(environment), "records": list(records)}


# record() ------------------------------------------------------------------------------------------------------------


def test_a_record_holds_what_was_measured_and_null_for_the_rest():
    made = record(tokens_per_step=1000, max_gradient_difference={"after": 1e-7}, sizes={"layers": 2, "tied": True})
    before, after = made["variants"]
    assert list(made) == ["notebook", "technique", "scale", "sizes", "variants"]
    assert made["sizes"] == {"layers": 2, "tied": True}
    assert before == {
        "name": "before",
        "predicted_bytes": 4 * MiB,
        "peak_bytes": 4 * MiB,
        "columns": dict.fromkeys(COLUMNS, 0) | {"parameters": MiB, "activations": 3 * MiB},
        "phase": "backward",
        "reserved_bytes": None,
        "device_bytes": None,
        "seconds": {"median": 0.5, "spread": 0.0123457, "repeats": 3},
        "tokens_per_second": 2000.0,
        "loss": 2.5,  # the measurement's last
        "max_gradient_difference": None,
    }
    assert list(before["columns"]) == list(COLUMNS)
    assert (after["seconds"], after["tokens_per_second"], after["loss"]) == (None, None, None)
    assert after["max_gradient_difference"] == 1e-7
    assert json.loads(json.dumps(made)) == made


def test_a_given_loss_goes_before_the_measured_one_and_none_leaves_it_out():
    assert [v["loss"] for v in record(loss={"before": 1.5, "after": 1.25})["variants"]] == [1.5, 1.25]
    assert [v["loss"] for v in record(loss={"before": None})["variants"]] == [None, None]


def test_the_scale_is_this_devices_unless_given(monkeypatch):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    assert record(scale=None)["scale"] == "cpu"
    assert record(scale="t4")["scale"] == "t4"


def test_records_are_appended_to_the_file_that_the_variable_names(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    monkeypatch.delenv(results.VARIABLE, raising=False)
    record()
    assert results.read_lines(path) == []
    monkeypatch.setenv(results.VARIABLE, str(path))
    made = [record(), record(notebook="04_y", technique="y")]
    assert [line["record"] for line in results.read_lines(path)] == made
    assert results.read_lines(path)[0]["environment"] == measured_environment("cpu")


def test_a_notebook_shows_a_record_as_one_line():
    pretty = pytest.importorskip("IPython.lib.pretty").pretty
    assert pretty(record()) == "recorded: 2 variants of x"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"loss": {"befor": 1.0}}, "loss names 'befor', but the comparison has 'before', 'after'"),
        ({"max_gradient_difference": {"x": 1.0}}, "max_gradient_difference names 'x'"),
        ({"loss": {"after": math.nan}}, "loss has to be a finite number, or null, not nan"),
        ({"max_gradient_difference": {"after": -1.0}}, "max_gradient_difference has to be"),
        ({"tokens_per_step": 0}, "tokens_per_step has to be a positive whole number"),
        ({"tokens_per_step": 1.5}, "tokens_per_step has to be a positive whole number"),
        ({"sizes": {"layers": [1]}}, "sizes.layers has to be a text, a finite number, true or false"),
        ({"notebook": ""}, "notebook has to be a text"),
        ({"technique": None}, "technique has to be a text"),
        ({"scale": 3}, "scale has to be a text"),
    ],
)
def test_what_a_record_cannot_hold_is_refused(given, found, tmp_path, monkeypatch):
    monkeypatch.setenv(results.VARIABLE, str(tmp_path / "records.jsonl"))
    with pytest.raises(ValueError, match=re.escape(found)):
        record(**given)
    assert not (tmp_path / "records.jsonl").exists()


def test_variants_of_two_devices_are_refused():
    other = measurement(environment=measured_environment("cpu") | {"device": "cuda"})
    with pytest.raises(ValueError, match="different devices"):
        results.record(compare(measurement(), other), notebook="a", technique="a", sizes={}, scale="cpu")


# The file ------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written_with_its_keys_in_one_order(tmp_path):
    data = results_file(record(), record(notebook="04_y", technique="y"))
    path = tmp_path / "results" / "cpu.json"
    results.write(path, data)
    assert results.load(path) == data
    first = path.read_bytes()
    assert first.endswith(b"}\n") and b"\r" not in first
    shuffled = json.loads(json.dumps(data, sort_keys=True))
    results.write(path, shuffled)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]  # nothing partial is left


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "cpu.json"
    results.write(path, results_file(record()))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="environment has no 'torch'"):
        results.write(path, results_file(environment={k: v for k, v in ENVIRONMENT.items() if k != "torch"}))
    assert path.read_bytes() == before


def _variant(**changes):
    return lambda data: data["records"][0]["variants"][1].update(changes)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda d: d.update(schema=2), "its schema is version 2; this memlab reads version 1"),
        (lambda d: d.pop("schema"), "its schema is version None"),
        (lambda d: d.pop("records"), "the file has no 'records'"),
        (lambda d: d.update(records={}), "the file.records has to be a list"),
        (lambda d: d.update(note="x"), "fields that the schema does not know: 'note'"),
        (lambda d: d["environment"].pop("commit"), "environment has no 'commit'"),
        (lambda d: d["environment"].update(date="yesterday"), "environment.date has to be a date"),
        (lambda d: d["environment"].update(device="tpu"), 'environment.device has to be "cpu" or "cuda"'),
        (lambda d: d["environment"].update(threads=True), "environment.threads has to be a whole number"),
        (lambda d: d["records"].append(3), "records[1] has to be an object, not 3"),
        (lambda d: d["records"][0].pop("sizes"), "records[0] has no 'sizes'"),
        (lambda d: d["records"][0].update(variants=[]), "at least one variant"),
        (lambda d: d["records"][0].update(environment={"x": 1}), "records[0].environment has fields"),
        (_variant(name="before"), "records[0]: two variants have one name"),
        (_variant(peak_bytes=1), "records[0].variants[1]: the columns sum to 2097152, but peak_bytes is 1"),
        (_variant(peak_bytes="12 MiB"), "records[0].variants[1].peak_bytes has to be a whole number"),
        (_variant(peak_bytes=2.0 * MiB), "peak_bytes has to be a whole number"),
        (_variant(reserved_bytes=0), "reserved_bytes has to be a whole number of at least 1, or null, not 0"),
        (_variant(phase="lunch"), "phase has to be one of forward, backward, optimizer, other"),
        (_variant(loss=math.inf), "loss has to be a finite number"),
        (_variant(seconds={"median": 1.0, "spread": 0.0}), "seconds has no 'repeats'"),
        (_variant(columns={"parameters": 2 * MiB}), "columns has no 'gradients'"),
        (lambda d: d["records"][0]["variants"][0]["columns"].update(parameters=-1), "columns.parameters has to be"),
    ],
)
def test_a_file_of_another_form_is_refused(change, found, tmp_path):
    data = copy.deepcopy(results_file(record()))
    results.validate(data)
    change(data)
    with pytest.raises(ValueError, match=re.escape(found)):
        results.validate(data)
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="cpu.json is not a results file"):
        results.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_what_is_no_results_file_at_all_is_refused(text, tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="cpu.json is not a results file"):
        results.load(path)


def test_a_run_replaces_its_own_records_and_the_others_keep_their_environment():
    first = results.merge(None, ENVIRONMENT, "03_x", lines(record()))
    first = results.merge(first, ENVIRONMENT, "01_y", lines(record("01_y", "y")))
    assert [one["notebook"] for one in first["records"]] == ["01_y", "03_x"]
    assert all("environment" not in one for one in first["records"])

    later = ENVIRONMENT | {"date": "2026-02-01", "torch": "2.14.0"}
    new = [record(sizes={"layers": 3}), record(sizes={"layers": 4})]
    second = results.merge(first, later, "03_x", lines(*new, torch="2.14.0", date="2026-02-01"))
    results.validate(second)
    kept, *fresh = second["records"]
    assert second["environment"] == later
    assert kept == first["records"][0] | {"environment": {"torch": "2.13.0", "date": "2026-01-31"}}
    assert fresh == new
    assert results.environment_of(second, kept) == ENVIRONMENT
    assert results.environment_of(second, fresh[0]) == later

    # Run again, it is of the file's environment, and a notebook that records no more loses its records.
    third = results.merge(second, later, "01_y", lines(record("01_y", "y"), torch="2.14.0", date="2026-02-01"))
    assert "environment" not in third["records"][0]
    assert [one["notebook"] for one in results.merge(third, later, "03_x", [])["records"]] == ["01_y"]


def test_a_record_says_in_what_it_differs_from_the_runner():
    data = results.merge(None, ENVIRONMENT, "03_x", lines(record(), threads=1))
    assert data["records"][0]["environment"] == {"threads": 1}


def test_a_file_is_named_by_its_device():
    assert results.file_name(ENVIRONMENT) == "cpu.json"
    assert results.file_name(GPU) == "nvidia-h200.json"
    assert results.file_name(GPU | {"gpu": "Tesla T4 (16 GB)"}) == "tesla-t4-16-gb.json"


def test_the_environment_is_complete(tmp_path):
    results.validate(results_file(environment=results.environment(tmp_path, "cpu")))


def test_the_commit_says_when_tracked_files_differ(tmp_path):
    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        asked = ["git", "-C", str(tmp_path), *options, *arguments]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()

    assert results.commit(tmp_path) is None
    git("init", "-q")
    assert results.commit(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    head = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert results.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert results.commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "inner").mkdir()
    assert results.commit(tmp_path / "inner") is None  # the commit of somebody else's repository says nothing


# Tables --------------------------------------------------------------------------------------------------------------


def test_the_results_table():
    table = results.results_table(results_file(record(), record(technique="other")))
    assert table.splitlines() == [
        "**CPU, 2 threads** (torch 2.13.0; scale cpu; measured 2026-01-31)",
        "",
        "| notebook | variant | predicted | measured | residual | × less | seconds (spread) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| 03_x | before | 4.00 MiB | 4.00 MiB | +0.00 % | 1.00 | 0.5 (0.012) |",
        "|  | after | 2.02 MiB | 2.00 MiB | -0.99 % | 2.00 | - |",
        "| 03_x: other | before | 4.00 MiB | 4.00 MiB | +0.00 % | 1.00 | 0.5 (0.012) |",
        "|  | after | 2.02 MiB | 2.00 MiB | -0.99 % | 2.00 | - |",
    ]


def test_the_results_table_says_where_and_when():
    old = record() | {"environment": {"date": "2025-12-01", "torch": "2.11.0"}}
    caption = results.results_table(results_file(old, record(), environment=GPU)).splitlines()[0]
    assert caption == (
        "**NVIDIA H200, 140.00 GiB** (torch 2.11.0, 2.13.0; scale cpu; measured 2025-12-01 to 2026-01-31)"
    )
    assert results.results_table(results_file()).startswith("**CPU, 2 threads**")


def notebook(*cells, **about):
    """A notebook as JSON; a cell is its source, Markdown if it begins with # or <."""
    made = []
    for number, source in enumerate(cells):
        markdown = source[0] in "#<"
        cell = {"cell_type": "markdown" if markdown else "code", "id": f"c{number}", "metadata": {}}
        cell["source"] = source.splitlines(keepends=True)
        made.append(cell if markdown else cell | {"execution_count": None, "outputs": []})
    return {"cells": made, "metadata": {"memlab": about}, "nbformat": 4, "nbformat_minor": 5}


def write_notebook(path, *cells, **about):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(notebook(*cells, **about), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


PICTURE = b"\x89PNG a picture"


def show(path, picture, words, tag="readme-figure"):
    """Let the second cell show a picture."""
    book = json.loads(path.read_text(encoding="utf-8"))
    book["cells"][1]["metadata"]["tags"] = [tag]
    data = {"image/png": base64.b64encode(picture).decode(), "text/plain": words}
    book["cells"][1]["outputs"] = [{"output_type": "display_data", "data": data, "metadata": {}}]
    path.write_text(json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


BLOCK = "<!-- memlab:{0}:begin -->\nold\n<!-- memlab:{0}:end -->"


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(folder / "00_measuring_memory.ipynb", "# Measuring | memory\n\nText.", minutes=20)
    write_notebook(
        folder / "03_x.ipynb", "# The x technique", "a = 1", BLOCK.format("results") + "\nafter — it",
        minutes=15, needs=["00", "calculus"], column="optimizer_state",
    )  # fmt: skip
    show(folder / "03_x.ipynb", PICTURE, "Peak 4.00 MiB → 2.00 MiB: x.")
    write_notebook(folder / "electives" / "12_y.ipynb", "x = 1", needs=["x"], column=["activations", "batch"])
    blocks = "\n\n".join(BLOCK.format(name) for name in ("figure", "results", "map"))
    (tmp_path / "README.md").write_text(f"# Title\n\n{blocks}\n\nEnd.\n", encoding="utf-8")
    results.write(tmp_path / "results" / "nvidia-h200.json", results_file(record(), environment=GPU))
    results.write(tmp_path / "results" / "cpu.json", results_file(record()))
    return tmp_path


def test_the_map_of_the_notebooks(checkout):
    table = results.map_table(results.notebooks(checkout), checkout)
    assert table.splitlines()[2:] == [
        "| 00 | [Measuring \\| memory](notebooks/00_measuring_memory.ipynb) | - | 20 | - |",
        "| 03 | [The x technique](notebooks/03_x.ipynb) | optimizer state | 15 "
        "| [00](notebooks/00_measuring_memory.ipynb), calculus |",
        "| 12 | [12_y](notebooks/electives/12_y.ipynb) | activations, batch | - | [03](notebooks/03_x.ipynb) |",
    ]
    inside = results.map_table(results.notebooks(checkout), checkout / "notebooks" / "electives")
    assert "[The x technique](../03_x.ipynb)" in inside


def test_a_report_writes_the_tables_and_a_second_one_has_nothing_to_write(checkout):
    written = results.report(checkout)
    assert sorted(written) == ["README.md", "notebooks/03_x.ipynb", "results/figures/headline.png"]
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    files = results.load_all(checkout)
    assert [data["environment"]["gpu"] for data in files] == [None, "NVIDIA H200"]
    for data in files:
        assert results.results_table(data) in readme
    assert results.map_table(results.notebooks(checkout), checkout) in readme
    assert "old" not in readme and readme.startswith("# Title\n") and readme.endswith("-->\n\nEnd.\n")
    assert "![Peak 4.00 MiB → 2.00 MiB: x.](results/figures/headline.png)" in readme
    assert (checkout / "results/figures/headline.png").read_bytes() == PICTURE

    book = json.loads((checkout / "notebooks/03_x.ipynb").read_text(encoding="utf-8"))
    source = "".join(book["cells"][2]["source"])
    assert results.results_table(files[0]) in source and source.endswith("after — it")
    rest = notebook("# The x technique", "a = 1", source, minutes=15, needs=["00", "calculus"], column="optimizer_state")
    assert book["metadata"] == rest["metadata"]
    assert [cell["source"] for cell in book["cells"]] == [cell["source"] for cell in rest["cells"]]

    assert results.report(checkout, check=True) == []
    assert results.report(checkout) == []


def test_a_check_finds_what_differs_and_writes_nothing(checkout):
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    found = results.report(checkout, check=True)
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before
    assert [re.search(r"[\w/]+\.\w+", one)[0] for one in found] == [
        "README.md", "notebooks/03_x.ipynb", "results/figures/headline.png",
    ]  # fmt: skip
    assert "-old" in found[0] and "+| 03_x | before | 4.00 MiB" in found[0]

    results.report(checkout)
    path = checkout / "results" / "cpu.json"
    data = results.load(path)
    data["records"][0]["variants"][0]["predicted_bytes"] = 3 * MiB
    results.write(path, data)
    assert len(results.report(checkout, check=True)) == 2  # README.md and the notebook
    results.report(checkout)
    readme = checkout / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("4.00 MiB", "4.01 MiB"), encoding="utf-8")
    assert len(results.report(checkout, check=True)) == 1


def test_a_checkout_with_no_records_says_so(checkout):
    for path in (checkout / "results").glob("*.json"):
        path.unlink()
    show(checkout / "notebooks" / "03_x.ipynb", PICTURE, "no tag", tag="other")
    assert results.report(checkout) == ["README.md", "notebooks/03_x.ipynb"]
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    assert "Nothing is recorded yet." in readme
    assert "<!-- memlab:figure:begin -->\n<!-- memlab:figure:end -->" in readme
    assert results.report(checkout, check=True) == []


def _edit(name, old, new):
    def change(root):
        path = root / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "error", "found"),
    [
        (lambda root: (root / "README.md").unlink(), FileNotFoundError, "there is no README.md"),
        (_edit("README.md", BLOCK.format("map"), ""), ValueError, "README.md has no <!-- memlab:map:begin -->"),
        (_edit("README.md", "<!-- memlab:map:end -->", ""), ValueError, "README.md: a marker stands alone"),
        (_edit("README.md", "<!-- memlab:figure:begin -->\n", ""), ValueError, "README.md: a marker stands alone"),
        (_edit("README.md", "memlab:figure", "memlab:figrue"), ValueError, "memlab:figrue:begin -->: there is no such"),
        (_edit("notebooks/03_x.ipynb", "<!-- memlab:results:end", "<!-- x"), ValueError, "03_x.ipynb: a marker stands"),
        (_edit("results/cpu.json", '"schema": 1', '"schema": 0'), ValueError, "cpu.json is not a results file"),
        (_edit("results/cpu.json", '"03_x"', '"02_x"'), ValueError, "notebooks that are not there: '02_x'"),
    ],
)
def test_a_report_refuses_what_it_cannot_trust(change, error, found, checkout):
    change(checkout)
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    for check in (True, False):
        with pytest.raises(error, match=re.escape(found)):
            results.report(checkout, check=check)
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


def test_the_headline_is_what_a_notebook_shows(checkout):
    paths = results.notebooks(checkout)
    assert results.headline(paths) == (PICTURE, "Peak 4.00 MiB → 2.00 MiB: x.")
    results.report(checkout)
    show(paths[1], PICTURE + b" of a later run", "Peak 4.00 MiB → 2.00 MiB: x.")
    (found,) = results.report(checkout, check=True)
    assert found == "results/figures/headline.png is not the picture that the notebook shows"
    assert results.report(checkout) == ["results/figures/headline.png"]
    show(paths[1], PICTURE, "no tag", tag="other")
    assert results.headline(paths) is None
    write_notebook(paths[0], "# 00", "a = 1")
    for path in paths[:2]:
        show(path, PICTURE, "twice")
    with pytest.raises(ValueError, match="more than one cell"):
        results.headline(paths)
