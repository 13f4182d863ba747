"""The tables that are made from the records, and the blocks they stand in."""

import base64
import json
import re

import pytest

from memlab import report, results
from memlab.compare import compare
from memlab.ledger import COLUMNS, Ledger
from memlab.measurement import Measurement
from memlab.timing import Seconds
from memlab.units import MiB

ENVIRONMENT = {
    "device": "cpu",
    "gpu": None,
    "gpu_bytes": None,
    "torch": "2.13.0",
    "driver": None,
    "python": "3.11.7",
    "threads": 2,
    "commit": "0" * 40,
    "date": "2026-01-31",
}
GPU = ENVIRONMENT | {
    "device": "cuda",
    "gpu": "NVIDIA H200",
    "gpu_bytes": 140 * 2**30,
    "driver": "575.1",
}


def measurement(activations, seconds=None):
    columns = dict.fromkeys(COLUMNS, 0) | {"parameters": MiB, "activations": activations}
    return Measurement(
        sum(columns.values()), columns, "backward", Ledger([]), ENVIRONMENT, seconds=seconds
    )


def record(notebook="03_x", technique="x", after_seconds=None, **more):
    pair = [measurement(3 * MiB, Seconds(0.5, 0.0123456789, 3)), measurement(MiB, after_seconds)]
    compared = compare(*pair, predicted=[4 * MiB, 2 * MiB + 20972])
    more = {"sizes": {"layers": 2}, "scale": "cpu", **more}
    return results.record(compared, notebook=notebook, technique=technique, **more)


def claim(number=3, holds=True, notebook="03_x", **more):
    more = {"found": "It is so.", **more}
    return results.claim(number, "less memory", notebook=notebook, holds=holds, **more)


def results_file(*records, claims=(), environment=ENVIRONMENT):
    made = {"schema": results.SCHEMA, "environment": dict(environment), "records": list(records)}
    return made | ({"claims": list(claims)} if claims else {})


# Tables -------------------------------------------------------------------------------------------


def test_the_gpus_figure_stands_above_its_table(checkout):
    show(checkout / "notebooks" / "03_x.ipynb", b"another", "Less in less.", tag="gpu-figure")
    readme = checkout / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8") + BLOCK.format("gpu"), encoding="utf-8")
    pieces = record(technique="larger pieces", after_seconds=Seconds(0.25, 0.01, 3))
    results.write(checkout / "results" / "nvidia-h200.json", results_file(pieces, environment=GPU))
    report.generate(checkout)
    text = readme.read_text(encoding="utf-8")
    assert text.index("![Less in less.](results/figures/gpu.png)") < text.index(
        "| after | 2.00 MiB | 2.0 | 0.250 | 0.50 |"
    )
    assert (checkout / "results/figures/gpu.png").read_bytes() == b"another"
    assert report.generate(checkout, check=True) == []


def test_the_table_of_a_gpu_has_what_it_costs_in_time():
    pieces = record(technique="larger pieces", after_seconds=Seconds(0.25, 0.01, 3))
    sizes = {"batch_size": 2, "sequence_length": 1024}
    there = results_file(
        record(), pieces, record(technique="in 8 GiB", sizes=sizes), environment=GPU
    )
    assert report.gpu_table([results_file(pieces), there]).splitlines()[1:] == [
        "",
        "|  | peak | × less | seconds a step | × time |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| before | 4.00 MiB | 1.0 | 0.500 | 1.00 |",
        "| after | 2.00 MiB | 2.0 | 0.250 | 0.50 |",
        "",
        "In a budget of 8 GiB, 2 × 1,024 tokens a step: before: 4.00 MiB; after: 2.00 MiB.",
    ]
    assert report.gpu_table([results_file(pieces)]) == ""  # a CPU's
    untimed = results_file(record(technique="larger pieces"), environment=GPU)
    assert "| after | 2.00 MiB | 2.0 | - | - |" in report.gpu_table([untimed])


def test_the_results_table():
    table = report.results_table(results_file(record(), record(technique="other")))
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
    caption = report.results_table(results_file(old, record(), environment=GPU)).splitlines()[0]
    assert (
        caption
        == "**NVIDIA H200, 140.00 GiB** (torch 2.11.0, 2.13.0; scale cpu; measured 2025-12-01 to"
        " 2026-01-31)"
    )
    assert report.results_table(results_file()).startswith("**CPU, 2 threads**")


def test_the_summary_has_the_first_record_of_each_notebook(tmp_path):
    paths = [
        tmp_path / "notebooks" / name for name in ("00_none.ipynb", "03_x.ipynb", "04_y.ipynb")
    ]
    for path in paths:
        write_notebook(path, f"# About {path.stem}")
    first = record(after_seconds=Seconds(0.75, 0.1, 3), max_gradient_difference={"after": 0.0})
    other = record("04_y", "y", max_gradient_difference={"after": 2e-7})
    table = report.summary_table(
        results_file(first, record(technique="second"), other), paths, tmp_path
    )
    assert table.splitlines()[2:] == [
        (
            "| notebook | from → to | peak before | peak after | × less | residual | × time |"
            " gradients |"
        ),
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        (
            "| [About 03_x](notebooks/03_x.ipynb) | before → after | 4.00 MiB | 2.00 MiB | 2.00 |"
            " -0.99 % | 1.50 | equal |"
        ),
        (
            "| [About 04_y](notebooks/04_y.ipynb) | before → after | 4.00 MiB | 2.00 MiB | 2.00 |"
            " -0.99 % | - | within 2e-07 |"
        ),
    ]


def test_the_summary_compares_no_seconds_of_a_busy_machine(tmp_path):
    write_notebook(tmp_path / "notebooks/03_x.ipynb", "# About")
    paths = [tmp_path / "notebooks/03_x.ipynb"]
    for spread, shown in ((0.37, "| 1.50 |"), (0.38, "| - |")):
        busy = record(after_seconds=Seconds(0.75, spread, 3))
        assert shown in report.summary_table(results_file(busy), paths, tmp_path)


def test_the_cheat_sheet_has_a_row_for_each_notebook_with_words_and_records(tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(folder / "02_no_record.ipynb", "# 02 · Not run", column="batch", leave="ever")
    write_notebook(
        folder / "03_x.ipynb", "# 03 · The x | technique", column="optimizer_state", **WORDS
    )
    write_notebook(
        folder / "04_y.ipynb",
        "# No number",
        column=["gradients", "optimizer_state"],
        leave="it is slow",
    )
    write_notebook(folder / "05_z.ipynb", "# 05 · No words", column="batch")
    paths = sorted(folder.glob("*.ipynb"))
    x = record(after_seconds=Seconds(0.75, 0.1, 3))
    data = results_file(
        x, record(technique="second", after_seconds=None), record("04_y", "y"), record("05_z", "z")
    )
    assert report.cheat_sheet(data, paths, tmp_path).splitlines() == [
        "**CPU, 2 threads** (torch 2.13.0; scale cpu; measured 2026-01-31)",
        "",
        "| technique | shrinks | here | × less | × time | exact? | leave it when |",
        "| --- | --- | --- | ---: | ---: | --- | --- |",
        (
            "| [The x \\| technique](notebooks/03_x.ipynb) | optimizer state | before → after |"
            " 2.00 | 1.50 | yes | the batch \\| is small |"
        ),
        (
            "| [04_y](notebooks/04_y.ipynb) | gradients, optimizer state | before → after | 2.00 |"
            " - | - | it is slow |"
        ),
    ]
    inside = report.cheat_sheet(data, paths, tmp_path / "results")
    assert "(../notebooks/03_x.ipynb)" in inside
    assert report.cheat_sheet(data, paths[:1], tmp_path) == report.cheat_sheet(data, [], tmp_path)
    assert len(report.cheat_sheet(data, [], tmp_path).splitlines()) == 1


def test_the_cheat_sheet_compares_no_seconds_of_a_busy_machine(tmp_path):
    write_notebook(tmp_path / "03_x.ipynb", "# 03 · X", column="batch", **WORDS)
    for spread, shown in ((0.37, "| 1.50 |"), (0.38, "| - |")):
        busy = results_file(record(after_seconds=Seconds(0.75, spread, 3)))
        assert shown in report.cheat_sheet(busy, [tmp_path / "03_x.ipynb"], tmp_path)


def test_the_summary_of_a_run_that_stands_alone(tmp_path):
    alone = record() | {"variants": record()["variants"][:1]}
    write_notebook(tmp_path / "notebooks/03_x.ipynb", "a = 1")
    table = report.summary_table(results_file(alone), [tmp_path / "notebooks/03_x.ipynb"], tmp_path)
    assert (
        table.splitlines()[-1]
        == "| [03_x](notebooks/03_x.ipynb) | before | 4.00 MiB | - | - | +0.00 % | - | - |"
    )
    assert report.summary_table(results_file(), [], tmp_path).startswith("**CPU, 2 threads**")


def test_the_claims_and_their_verdicts(tmp_path):
    paths = [tmp_path / "notebooks/03_x.ipynb"]
    cpu = results_file(claims=[claim(when="it is large"), claim(10, holds=False)])
    same = results_file(claims=[claim(when="it is large")], environment=GPU)
    head = "|  | the article says | verdict | what was found | notebook |"
    link = "[03](notebooks/03_x.ipynb)"
    assert report.claims_table([cpu, same], paths, tmp_path).splitlines() == [
        head,
        "| --- | --- | --- | --- | --- |",
        f"| 3 | less memory | **holds when it is large** | It is so. | {link} |",
        f"| 10 | less memory | **does not hold** | It is so. | {link} |",
    ]
    other = results_file(claims=[claim(holds=False)], environment=GPU)
    table = report.claims_table([cpu, other], paths, tmp_path)
    assert "**CPU: holds when it is large; NVIDIA H200: does not hold**" in table
    assert report.claims_table([results_file()], paths, tmp_path) == ""


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
    text = (
        json.dumps(notebook(*cells, **about), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )
    path.write_text(text, encoding="utf-8")


WRITTEN = [
    "CHEATSHEET.md",
    "README.md",
    "notebooks/03_x.ipynb",
    "results/README.md",
    "results/figures/headline.png",
]
DOCUMENTS = {
    "README.md": ("figure", "summary", "map"),
    "CHEATSHEET.md": ("cheatsheet",),
    "results/README.md": ("results", "claims"),
}
WORDS = {"exact": "yes", "leave": "the batch | is small"}
PICTURE = b"\x89PNG a picture"


def show(path, picture, words, tag="readme-figure"):
    """Let the second cell show a picture."""
    book = json.loads(path.read_text(encoding="utf-8"))
    book["cells"][1]["metadata"]["tags"] = [tag]
    data = {"image/png": base64.b64encode(picture).decode(), "text/plain": words}
    book["cells"][1]["outputs"] = [{"output_type": "display_data", "data": data, "metadata": {}}]
    path.write_text(
        json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


BLOCK = "<!-- memlab:{0}:begin -->\nold\n<!-- memlab:{0}:end -->"


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(
        folder / "00_measuring_memory.ipynb", "# Measuring | memory\n\nText.", minutes=20
    )
    write_notebook(
        folder / "03_x.ipynb",
        "# The x technique",
        "a = 1",
        BLOCK.format("results") + "\nafter — it",
        minutes=15,
        needs=["00", "calculus"],
        column="optimizer_state",
        **WORDS,
    )
    show(folder / "03_x.ipynb", PICTURE, "Peak 4.00 MiB → 2.00 MiB: x.")
    write_notebook(
        folder / "electives" / "12_y.ipynb", "x = 1", needs=["x"], column=["activations", "batch"]
    )
    (tmp_path / "results").mkdir()
    for document, names in DOCUMENTS.items():
        blocks = "\n\n".join(BLOCK.format(name) for name in names)
        (tmp_path / document).write_text(f"# Title\n\n{blocks}\n\nEnd.\n", encoding="utf-8")
    results.write(
        tmp_path / "results" / "nvidia-h200.json", results_file(record(), environment=GPU)
    )
    results.write(tmp_path / "results" / "cpu.json", results_file(record(), claims=[claim()]))
    return tmp_path


def test_the_map_of_the_notebooks(checkout):
    table = report.map_table(report.notebooks(checkout), checkout)
    assert table.splitlines()[2:] == [
        "| 00 | [Measuring \\| memory](notebooks/00_measuring_memory.ipynb) | - | 20 | - |",
        (
            "| 03 | [The x technique](notebooks/03_x.ipynb) | optimizer state | 15 "
            "| [00](notebooks/00_measuring_memory.ipynb), calculus |"
        ),
        (
            "| 12 | [12_y](notebooks/electives/12_y.ipynb) | activations, batch | - |"
            " [03](notebooks/03_x.ipynb) |"
        ),
    ]
    inside = report.map_table(report.notebooks(checkout), checkout / "notebooks" / "electives")
    assert "[The x technique](../03_x.ipynb)" in inside


def test_the_map_links_to_colab_by_the_public_address(checkout):
    assert "Colab" not in (
        report.generate(checkout) and (checkout / "README.md").read_text(encoding="utf-8")
    )
    owner = (  # not written out: another owner's address in a file would be found as a mistake
        "somebody"
    )
    project = f'[project.urls]\nRepository = "https://github.com/{owner}/memlab"\n'
    (checkout / "pyproject.toml").write_text(project, encoding="utf-8")
    assert report.generate(checkout) == ["README.md"]
    address = (
        f"https://colab.research.google.com/github/{owner}/memlab/blob/main/notebooks/03_x.ipynb"
    )
    assert f"| [Colab]({address}) |" in (checkout / "README.md").read_text(encoding="utf-8")


def test_a_report_writes_the_tables_and_a_second_one_has_nothing_to_write(checkout):
    written = report.generate(checkout)
    assert sorted(written) == WRITTEN
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    long = (checkout / "results/README.md").read_text(encoding="utf-8")
    files, paths = results.load_all(checkout), report.notebooks(checkout)
    assert [data["environment"]["gpu"] for data in files] == [None, "NVIDIA H200"]
    for data in files:
        assert report.results_table(data) in long
        assert report.summary_table(data, paths, checkout) in readme
    assert report.map_table(paths, checkout) in readme
    assert (
        report.claims_table(files, paths, checkout / "results") in long
        and "(../notebooks/03_x.ipynb)" in long
    )
    sheet = (checkout / "CHEATSHEET.md").read_text(encoding="utf-8")
    assert (
        report.cheat_sheet(files[0], paths, checkout) in sheet
        and "NVIDIA" not in sheet
        and "old" not in sheet
    )
    assert (
        "old" not in readme and readme.startswith("# Title\n") and readme.endswith("-->\n\nEnd.\n")
    )
    assert "![Peak 4.00 MiB → 2.00 MiB: x.](results/figures/headline.png)" in readme
    assert (checkout / "results/figures/headline.png").read_bytes() == PICTURE

    book = json.loads((checkout / "notebooks/03_x.ipynb").read_text(encoding="utf-8"))
    source = "".join(book["cells"][2]["source"])
    assert report.results_table(files[0]) in source and source.endswith("after — it")
    about = {"minutes": 15, "needs": ["00", "calculus"], "column": "optimizer_state", **WORDS}
    rest = notebook("# The x technique", "a = 1", source, **about)
    assert book["metadata"] == rest["metadata"]
    assert [cell["source"] for cell in book["cells"]] == [cell["source"] for cell in rest["cells"]]

    assert report.generate(checkout, check=True) == []
    assert report.generate(checkout) == []


def test_a_check_finds_what_differs_and_writes_nothing(checkout):
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    found = report.generate(checkout, check=True)
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before
    assert sorted(re.search(r"[\w/]+\.\w+", one)[0] for one in found) == WRITTEN
    assert (
        "-old" in found[1]
        and "+| [03_x](notebooks/03_x.ipynb) | optimizer state | before → after | 2.00" in found[1]
    )
    assert "-old" in found[2] and "+| 03_x | before | 4.00 MiB" in found[2]

    report.generate(checkout)
    path = checkout / "results" / "cpu.json"
    data = results.load(path)
    data["records"][0]["variants"][0]["predicted_bytes"] = 3 * MiB
    results.write(path, data)
    assert (
        len(report.generate(checkout, check=True)) == 3
    )  # both tables of predictions and the notebook
    report.generate(checkout)
    readme = checkout / "README.md"
    readme.write_text(
        readme.read_text(encoding="utf-8").replace("4.00 MiB", "4.01 MiB"), encoding="utf-8"
    )
    assert len(report.generate(checkout, check=True)) == 1


def test_a_checkout_with_no_records_says_so(checkout):
    for path in (checkout / "results").glob("*.json"):
        path.unlink()
    show(checkout / "notebooks" / "03_x.ipynb", PICTURE, "no tag", tag="other")
    assert report.generate(checkout) == [
        "README.md",
        "CHEATSHEET.md",
        "results/README.md",
        "notebooks/03_x.ipynb",
    ]
    assert "Nothing is recorded yet." in (checkout / "CHEATSHEET.md").read_text(encoding="utf-8")
    assert "No claim is tested yet." in (checkout / "results/README.md").read_text(encoding="utf-8")
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    assert "Nothing is recorded yet." in readme
    assert "<!-- memlab:figure:begin -->\n<!-- memlab:figure:end -->" in readme
    assert report.generate(checkout, check=True) == []


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
        (
            lambda root: (root / "results/README.md").unlink(),
            FileNotFoundError,
            "there is no results/README.md",
        ),
        (
            lambda root: (root / "CHEATSHEET.md").unlink(),
            FileNotFoundError,
            "there is no CHEATSHEET.md",
        ),
        (
            _edit("CHEATSHEET.md", BLOCK.format("cheatsheet"), ""),
            ValueError,
            "CHEATSHEET.md has no <!-- memlab:cheatsheet:begin -->",
        ),
        (
            _edit("README.md", BLOCK.format("map"), ""),
            ValueError,
            "README.md has no <!-- memlab:map:begin -->",
        ),
        (
            _edit("results/README.md", BLOCK.format("claims"), ""),
            ValueError,
            "results/README.md has no <!-- memlab:claims:begin -->",
        ),
        (
            _edit("README.md", "<!-- memlab:map:end -->", ""),
            ValueError,
            "README.md: a marker stands alone",
        ),
        (
            _edit("README.md", "<!-- memlab:figure:begin -->\n", ""),
            ValueError,
            "README.md: a marker stands alone",
        ),
        (
            _edit("README.md", "memlab:figure", "memlab:figrue"),
            ValueError,
            "memlab:figrue:begin -->: there is no such",
        ),
        (
            _edit("notebooks/03_x.ipynb", "<!-- memlab:results:end", "<!-- x"),
            ValueError,
            "03_x.ipynb: a marker stands",
        ),
        (
            _edit("results/cpu.json", '"schema": 1', '"schema": 0'),
            ValueError,
            "cpu.json is not a results file",
        ),
        (
            _edit("results/cpu.json", '"03_x"', '"02_x"'),
            ValueError,
            "notebooks that are not there: '02_x'",
        ),
    ],
)
def test_a_report_refuses_what_it_cannot_trust(change, error, found, checkout):
    change(checkout)
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    for check in (True, False):
        with pytest.raises(error, match=re.escape(found)):
            report.generate(checkout, check=check)
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


def test_the_headline_is_what_a_notebook_shows(checkout):
    paths = report.notebooks(checkout)
    assert report.figure_of(paths) == (PICTURE, "Peak 4.00 MiB → 2.00 MiB: x.")
    report.generate(checkout)
    show(paths[1], PICTURE + b" of a later run", "Peak 4.00 MiB → 2.00 MiB: x.")
    (found,) = report.generate(checkout, check=True)
    assert found == "results/figures/headline.png is not the picture that the notebook shows"
    assert report.generate(checkout) == ["results/figures/headline.png"]
    show(paths[1], PICTURE, "no tag", tag="other")
    assert report.figure_of(paths) is None
    write_notebook(paths[0], "# 00", "a = 1")
    for path in paths[:2]:
        show(path, PICTURE, "twice")
    with pytest.raises(ValueError, match="more than one cell"):
        report.figure_of(paths)


def test_no_residual_is_less_than_nothing():
    assert [report._percent(value) for value in (-0.001, 0.0, -0.01)] == [
        "+0.00 %",
        "+0.00 %",
        "-0.01 %",
    ]


def test_a_difference_is_within_what_is_said_of_it():
    assert [report._at_most(value) for value in (0.14, 0.1, 9.1e-7, 3e-7, 1)] == [
        "2e-01",
        "1e-01",
        "1e-06",
        "3e-07",
        "1e+00",
    ]
