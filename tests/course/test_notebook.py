"""What the notebooks are, and which are meant."""

from pathlib import Path

import nbformat
import pytest

from memlab.course import notebook
from memlab.course.notebook import Lesson

new = nbformat.v4


def code(source, *tags):
    return new.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def save(path, *cells, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new.new_notebook(cells=list(cells), metadata=metadata), path)
    return path


# One notebook -------------------------------------------------------------------------------------


def test_a_lesson_is_its_first_heading_and_its_metadata(tmp_path):
    cells = [code("# no title"), new.new_markdown_cell("Words.\n\n# 03 · Title\n\n## More")]
    about = {"minutes": 5, "column": ["optimizer_state", "batch"]}
    path = save(tmp_path / "notebooks/03_x_y.ipynb", *cells, memlab=about)
    lesson = notebook.lesson(path)
    assert lesson == Lesson(path, "03 · Title", about)
    assert (lesson.name, lesson.number, lesson.topic) == ("03_x_y", "03", "x_y")
    assert lesson.columns == "optimizer state, batch"
    assert lesson.link(tmp_path / "results") == "[03 · Title](../notebooks/03_x_y.ipynb)"
    bare = notebook.lesson(save(tmp_path / "00_bare.ipynb"))
    assert (bare.title, bare.columns, bare.about) == ("00_bare", "", {})


def test_the_source_hash_is_of_the_code_only(tmp_path):
    path = save(tmp_path / "a.ipynb", new.new_markdown_cell("x"), code("a = 1\nb = 2"), code("c"))
    book = nbformat.read(path, as_version=4)
    first = notebook.source_hash(book)
    assert notebook.source_hash(path) == notebook.source_hash(str(path)) == first
    book.cells[0].source = "# Another title"
    book.cells[1].outputs = [new.new_output("stream", text="out")]
    book.cells[1].execution_count = 3
    book.metadata["memlab"] = {"source_hash": first}
    assert notebook.source_hash(book) == first
    book.cells[1].source += " "
    assert notebook.source_hash(book) != first
    joined = save(tmp_path / "b.ipynb", code("a = 1\nb = 2c"))
    assert notebook.source_hash(joined) != first


def test_strip_removes_a_widget_and_keeps_what_stands_beside_it():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "VBox()"}
    shown = [
        new.new_output("display_data", data=dict(view)),
        new.new_output("display_data", data=view | {"image/png": "AAAA"}),
        new.new_output("display_data", data={"text/plain": "text"}),
        new.new_output("stream", text="printed"),
    ]
    cells = [new.new_code_cell("x", outputs=shown), new.new_markdown_cell("y")]
    book = new.new_notebook(cells=cells)
    notebook.strip(book)
    kept = book.cells[0].outputs
    types = [sorted(output.get("data", {})) for output in kept]
    assert types == [["image/png", "text/plain"], ["text/plain"], []]
    assert kept[2].text == "printed"
    nbformat.validate(book)


def test_the_cells_that_will_run_are_counted(tmp_path):
    cells = [code("1", "large"), code(" "), code("2"), new.new_markdown_cell("3")]
    path = save(tmp_path / "a.ipynb", *cells)
    assert (notebook.count_cells(path), notebook.count_cells(path, "large")) == (2, 1)
    path.write_text("{")
    assert notebook.count_cells(path) == notebook.count_cells(tmp_path / "none.ipynb") == 0


# Which --------------------------------------------------------------------------------------------


@pytest.fixture
def names(tmp_path):
    core = ("00_measuring_memory", "03_gradient_checkpointing", "04_gradient_accumulation")
    for name in (*core, "10_fused_loss", "e1_muon"):
        save(tmp_path / "notebooks" / "in_depth" / f"{name}.ipynb")
    save(tmp_path / "notebooks" / "03_gradient_checkpointing.ipynb")
    save(tmp_path / "notebooks/in_depth/.ipynb_checkpoints/00_measuring_memory-checkpoint.ipynb")
    return tmp_path


def numbers(paths):
    return [path.stem.split("_")[0] for path in paths]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], ["00", "03", "04", "10", "e1"]),  # in order: the core, then the electives
        (["03"], ["03"]),
        (["3", "0"], ["03", "00"]),
        (["10"], ["10"]),
        (["gradient_checkpointing", "03"], ["03"]),
        (["03_grad", "muon", "measuring"], ["03", "e1", "00"]),
        (["00_measuring_memory.ipynb"], ["00"]),
        (["notebooks/04_gradient_accumulation.ipynb"], ["04"]),
    ],
)
def test_a_notebook_is_found_by_what_people_type(names, given, found, monkeypatch):
    monkeypatch.chdir(names)
    assert numbers(notebook.select(given, names)) == found


def test_a_lesson_is_meant_by_its_path_and_the_notebook_behind_it_by_its_name(names, monkeypatch):
    monkeypatch.chdir(names)
    (behind,) = notebook.select(["03_gradient_checkpointing"], names)
    (lesson,) = notebook.select(["notebooks/03_gradient_checkpointing.ipynb"], names)
    assert (behind.parent.name, lesson.parent.name) == ("in_depth", "notebooks")
    assert notebook.lessons(names) == [lesson]


def test_an_elective_lesson_is_a_lesson_and_the_notebook_behind_it_is_none(names):
    elective = save(names / "notebooks" / "electives" / "e1_muon.ipynb")
    core = names / "notebooks" / "03_gradient_checkpointing.ipynb"
    assert all(notebook.is_lesson(path, names) for path in (elective, core))
    assert not any(notebook.is_lesson(path, names) for path in notebook.in_depth(names))


def test_a_notebook_is_found_by_its_path_from_anywhere(names, tmp_path):
    path = save(tmp_path / "elsewhere" / "mine.ipynb")
    assert notebook.select([str(path)], names) == [path]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("7", "'7' is no notebook. There are:\n  00_measuring_memory\n  03_gradient_checkpoint"),
        ("1", "'1' is no notebook"),
        ("checkpointing", "'checkpointing' is no notebook"),
        (
            "gradient",
            "'gradient' is the beginning of several notebooks. There match:\n"
            "  03_gradient_checkpointing\n  04",
        ),
        ("", "'' is no notebook"),
    ],
)
def test_an_unknown_notebook_lists_those_there_are(names, given, message):
    with pytest.raises(ValueError) as error:
        notebook.select([given], names)
    assert str(error.value).startswith(message)


def test_the_root_is_this_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert notebook.find_root() == Path(notebook.__file__).resolve().parents[2]


def test_the_root_of_an_installed_memlab_is_the_checkout_one_stands_in(monkeypatch, tmp_path):
    installed = tmp_path / "site-packages" / "memlab" / "course" / "notebook.py"
    monkeypatch.setattr(notebook, "__file__", str(installed))
    checkout = tmp_path / "checkout"
    (checkout / "memlab" / "course").mkdir(parents=True)
    (checkout / "notebooks").mkdir()
    monkeypatch.chdir(checkout / "notebooks")
    assert notebook.find_root() == checkout
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="memlab is installed without them"):
        notebook.find_root()
