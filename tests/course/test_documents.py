"""The generated blocks, and the documents they stand in."""

import re

import pytest

from memlab import results
from memlab.course import documents, lessons_table, overviews, tables
from memlab.course.material import gather
from memlab.course.notebook import read, written
from memlab.units import MiB
from tests.course.test_material import PICTURE, showing
from tests.records import GPU, claim, pair, record, results_file, timed, variant

WRITTEN = [
    "CHEATSHEET.md",
    "README.md",
    "notebooks/in_depth/03_x.ipynb",
    "results/README.md",
    "results/figures/headline.png",
]
BLOCKS = {
    "README.md": ("figure", "validation", "address", "lessons", "three_factors", "map"),
    "CHEATSHEET.md": ("cheatsheet",),
    "results/README.md": (
        *("results", "summary", "claims", "gpu", "gpu_summary", "predictions", "zoo", "watched"),
    ),
}
BLOCK = "<!-- memlab:{0}:begin -->\nold\n<!-- memlab:{0}:end -->"


def show(path, words="Peak 4.00 MiB → 2.00 MiB: x. And much more.", **more):
    """Let the notebook show a picture, between its title and a generated table."""
    showing(path, words, **more)
    book = read(path)
    words = ["# 03 · The x technique", BLOCK.format("results") + "\nafter — it"]
    before, after = [{"cell_type": "markdown", "metadata": {}, "source": [text]} for text in words]
    book["cells"] = [before, *book["cells"], after]
    book["metadata"] = {"memlab": {"column": "batch", "leave": "it is small", "minutes": 15}}
    path.write_text(written(book), encoding="utf-8")


def files(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def text(root, name):
    return (root / name).read_text(encoding="utf-8")


def edit(root, name, old, new):
    assert old in text(root, name)
    (root / name).write_text(text(root, name).replace(old, new), encoding="utf-8")


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "notebooks" / "in_depth").mkdir(parents=True)
    show(tmp_path / "notebooks" / "in_depth" / "03_x.ipynb")
    of_cpu = results_file(record(), claim())
    results.write(tmp_path / "results" / "cpu.json", of_cpu)
    of_gpu = results_file(record(scale="t4"), environment=GPU)
    results.write(tmp_path / "results" / "nvidia-h200.json", of_gpu)
    for document, names in BLOCKS.items():
        blocks = "\n\n".join(BLOCK.format(name) for name in names)
        (tmp_path / document).write_text(f"# Title\n\n{blocks}\n\nEnd.\n", encoding="utf-8")
    return tmp_path


# What is written ----------------------------------------------------------------------------------


def test_every_table_stands_in_its_place_and_a_second_run_has_nothing_to_write(checkout):
    assert sorted(documents.generate(checkout)) == WRITTEN
    material = gather(checkout)
    cpu, gpu = material.files
    readme = text(checkout, "README.md")
    assert readme.startswith("# Title\n") and readme.endswith("-->\n\nEnd.\n")
    assert overviews.map_table((), checkout, None, material.lessons) in readme
    sheet = text(checkout, "CHEATSHEET.md")
    assert (
        lessons_table.cheat_sheet(material.files, material.lessons, (), checkout, checkout) in sheet
    )
    long, inside = text(checkout, "results/README.md"), checkout / "results"
    assert overviews.claims_table(material.files, material.lessons, inside) in long
    assert all(tables.results_table(data) in long for data in material.files)
    assert not any("\nold\n" in document for document in (readme, sheet, long))

    book = read(checkout / "notebooks/in_depth/03_x.ipynb")
    table = "".join(book["cells"][2]["source"])
    assert tables.results_table(cpu) in table and table.endswith("after — it")
    assert book["cells"][0]["source"] == ["# 03 · The x technique"]

    assert documents.generate(checkout, check=True) == []
    assert documents.generate(checkout) == []


def test_a_gpu_in_the_courses_sizes_is_in_the_long_document_only(checkout):
    large = results_file(record(scale="large"), environment=GPU)
    results.write(checkout / "results" / "nvidia-h200-large.json", large)
    documents.generate(checkout)
    material = gather(checkout)
    readme, long = text(checkout, "README.md"), text(checkout, "results/README.md")
    for data in material.files:
        summary = overviews.summary_table(data, material.lessons, checkout / "results")
        assert long.count(summary) == 1
    assert "scale t4" not in readme


def test_a_figure_is_described_in_one_sentence(checkout):
    documents.generate(checkout)
    line = "![Peak 4.00 MiB → 2.00 MiB: x.](results/figures/headline.png)"
    assert line in text(checkout, "README.md").splitlines()
    assert (checkout / "results/figures/headline.png").read_bytes() == PICTURE

    show(checkout / "notebooks/in_depth/03_x.ipynb", picture=PICTURE + b" of a later run")
    assert "results/figures/headline.png" in documents.generate(checkout)


def test_the_gpus_figure_stands_above_its_table(checkout):
    path = checkout / "notebooks" / "in_depth" / "03_x.ipynb"
    show(path, "Less in less. More.", picture=b"another", tag="gpu-figure")
    pieces = record(technique="larger pieces", variants=pair(timed(0.25)))
    file = checkout / "results" / "nvidia-h200.json"
    results.write(file, results_file(pieces, environment=GPU))
    documents.generate(checkout)
    long = text(checkout, "results/README.md")
    figure = long.index("![Less in less.](figures/gpu.png)")
    assert figure < long.index("| after | 2.00 MiB | 2.0 | 0.250 | 0.50 |")
    assert (checkout / "results/figures/gpu.png").read_bytes() == b"another"


def test_nothing_leads_to_an_address_that_there_is_not(checkout):
    project = '[project.urls]\nRepository = "https://github.com/{}/memlab"\n'
    (checkout / "pyproject.toml").write_text(project.format("OWNER"), encoding="utf-8")
    documents.generate(checkout)
    readme = text(checkout, "README.md")
    assert "OWNER" not in readme and "colab.research" not in readme and "make address" in readme

    # Not written out: another owner's address in this file would be found as a mistake.
    owner = "somebody"
    (checkout / "pyproject.toml").write_text(project.format(owner), encoding="utf-8")
    assert documents.generate(checkout) == ["README.md"]
    there = f"https://colab.research.google.com/github/{owner}/memlab/blob/main"
    readme = text(checkout, "README.md")
    assert f"| [Colab]({there}/notebooks/in_depth/03_x.ipynb) |" in readme
    assert f"git+https://github.com/{owner}/memlab" in readme and "make address" not in readme


def test_a_checkout_with_no_records_says_so(checkout):
    for path in (checkout / "results").glob("*.json"):
        path.unlink()
    show(checkout / "notebooks" / "in_depth" / "03_x.ipynb", tag="other")
    assert sorted(documents.generate(checkout)) == WRITTEN[:-1]
    for document, sentence in (
        ("results/README.md", documents.NOTHING),
        ("README.md", "<!-- memlab:figure:begin -->\n<!-- memlab:figure:end -->"),
        ("CHEATSHEET.md", documents.NOTHING),
        ("results/README.md", "No claim is tested yet."),
        ("results/README.md", "Nothing is predicted yet."),
        ("notebooks/in_depth/03_x.ipynb", documents.NOTHING),
    ):
        assert sentence in text(checkout, document)
    assert documents.generate(checkout, check=True) == []


# What is checked ----------------------------------------------------------------------------------


def test_a_check_finds_what_differs_and_writes_nothing(checkout):
    before = files(checkout)
    found = documents.generate(checkout, check=True)
    assert files(checkout) == before
    assert sorted(re.search(r"[\w/]+\.\w+", each)[0] for each in found) == WRITTEN
    assert (
        "-old" in found[1]
        and "+| [The x technique](notebooks/in_depth/03_x.ipynb) | batch" in found[1]
    )
    assert "-old" in found[2] and "+| 03_x | before | 4.00 MiB" in found[2]

    documents.generate(checkout)
    other = record(variants=[variant(predicted=3 * MiB), pair()[1]])
    results.write(checkout / "results" / "cpu.json", results_file(other, claim()))
    # The tables of the predictions, and the notebook's.
    assert len(documents.generate(checkout, check=True)) == 2
    documents.generate(checkout)
    edit(checkout, "results/README.md", "4.00 MiB |", "4.01 MiB |")
    assert len(documents.generate(checkout, check=True)) == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("README.md", BLOCK.format("map"), ""), "README.md has no <!-- memlab:map:begin -->"),
        (
            ("CHEATSHEET.md", BLOCK.format("cheatsheet"), ""),
            "CHEATSHEET.md has no <!-- memlab:cheatsheet:begin -->",
        ),
        (
            ("results/README.md", BLOCK.format("claims"), ""),
            "results/README.md has no <!-- memlab:claims:begin -->",
        ),
        (("README.md", "<!-- memlab:map:end -->", ""), "README.md: a marker stands alone"),
        (("README.md", "<!-- memlab:figure:begin -->\n", ""), "README.md: a marker stands alone"),
        (("README.md", "memlab:figure", "memlab:figrue"), "memlab:figrue:begin -->: there is no"),
        (
            ("notebooks/in_depth/03_x.ipynb", "<!-- memlab:results:end", "<!-- x"),
            "notebooks/in_depth/03_x.ipynb: a marker stands",
        ),
        (("results/cpu.json", '"schema": 2', '"schema": 0'), "cpu.json is not a results file"),
        (("results/cpu.json", '"03_x"', '"02_x"'), "notebooks that are not there: '02_x'"),
    ],
)
def test_a_report_refuses_what_it_cannot_trust(change, found, checkout):
    edit(checkout, *change)
    before = files(checkout)
    for check in (True, False):
        with pytest.raises(ValueError, match=re.escape(found)):
            documents.generate(checkout, check=check)
    assert files(checkout) == before


@pytest.mark.parametrize("document", BLOCKS)
def test_a_document_that_is_not_there_is_named(document, checkout):
    (checkout / document).unlink()
    before = files(checkout)
    with pytest.raises(FileNotFoundError, match=f"there is no {document}"):
        documents.generate(checkout)
    assert files(checkout) == before
