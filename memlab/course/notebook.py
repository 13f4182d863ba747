"""The course's notebooks: where they are, what they are about, what may be committed of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Lesson:
    """A notebook as the tables need it.

    Attributes:
        path: the file.
        title: its first heading; the file's name where it has none.
        about: what its metadata say under "memlab": `{"minutes": 20, "needs": ["00"], "column":
            "activations", "exact": "yes", "leave": "the batch is small"}`.
    """

    path: Path
    title: str
    about: dict[str, object]

    @property
    def name(self) -> str:
        """The file's name without `.ipynb`, by which records name it."""
        return self.path.stem

    @property
    def number(self) -> str:
        """`03` of `03_gradient_checkpointing`."""
        return self.name.partition("_")[0]

    @property
    def topic(self) -> str:
        """`gradient_checkpointing` of `03_gradient_checkpointing`."""
        return self.name.partition("_")[2]

    @property
    def columns(self) -> str:
        """The ledger's columns that it shrinks, in words; empty where the metadata name none."""
        column = self.about.get("column") or []
        return ", ".join([column] if isinstance(column, str) else column).replace("_", " ")

    def link(self, base: Path, text: str | None = None) -> str:
        """A Markdown link to it from a document in `base`, with its title as the text."""
        return f"[{text or self.title}]({relative(self.path, base)})"


def relative(path: Path, base: Path) -> str:
    """The path as a link in a document that lies in `base`."""
    return Path(os.path.relpath(path, base)).as_posix()


def find_root() -> Path:
    """The checkout: that of this package, else the one in or above the current folder.

    Raises:
        FileNotFoundError: memlab is installed without its notebooks, and the current folder is in
            no checkout.
    """
    folders = [Path(__file__).resolve().parents[2], Path.cwd(), *Path.cwd().parents]
    for folder in folders:
        if (folder / "notebooks").is_dir() and (folder / "memlab" / "course").is_dir():
            return folder
    raise FileNotFoundError(
        "the notebooks are not here: memlab is installed without them. Clone the repository and run"
        " this in it."
    )


def in_depth(root: Path) -> list[Path]:
    """The notebooks that are the benchmark, in their order: the core, then the electives."""
    return sorted((Path(root) / "notebooks" / "in_depth").glob("[!.]*.ipynb"))


def lessons(root: Path) -> list[Path]:
    """The lessons in their order, the electives last. Each has the name of the notebook in depth
    behind it, or says in its metadata where its evidence is.
    """
    folder = Path(root) / "notebooks"
    return [*sorted(folder.glob("[!.]*.ipynb")), *sorted(folder.glob("electives/[!.]*.ipynb"))]


def is_lesson(path: str | Path, root: Path) -> bool:
    """Whether a notebook is a lesson, a core one or an elective, and not one in depth."""
    return Path(path).resolve() in {each.resolve() for each in lessons(root)}


def read(path: str | Path) -> dict:
    """A notebook as the JSON that it is."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def written(notebook: dict) -> str:
    """A notebook's text as nbformat writes it, so that two writers make no difference."""
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def lesson(path: Path) -> Lesson:
    """Read what the tables say of a notebook."""
    notebook = read(path)
    headings = [
        found[1].strip()
        for cell in notebook.get("cells", [])
        if cell["cell_type"] == "markdown"
        and (found := re.search(r"^# +(.+)$", "".join(cell["source"]), flags=re.MULTILINE))
    ]
    title = headings[0] if headings else path.stem
    return Lesson(path, title, notebook.get("metadata", {}).get("memlab", {}))


def select(names: Sequence[str], root: Path) -> list[Path]:
    """The notebooks that people mean by "03", "3", "gradient_checkpointing", "03_grad" or a path;
    all that are the benchmark by nothing. A lesson is meant by its path, or by its name where
    there is no notebook in depth behind it.

    Raises:
        ValueError: a name is no notebook's, or that of several.
    """
    benchmark = in_depth(root)
    behind = {path.name for path in benchmark}
    paths = [*benchmark, *(path for path in lessons(root) if path.name not in behind)]
    chosen = []
    for name in names:
        if Path(name).suffix == ".ipynb" and Path(name).is_file():
            found = [Path(name).resolve()]
        else:
            found = _meant(Path(name).name.removesuffix(".ipynb"), paths)
        if len(found) != 1:
            what = "is the beginning of several notebooks" if found else "is no notebook"
            listed = "\n  ".join(path.stem for path in found or paths)
            raise ValueError(f"{name!r} {what}. There {'match' if found else 'are'}:\n  {listed}")
        chosen += [path for path in found if path not in chosen]
    return chosen if names else benchmark


def _meant(typed: str, paths: Sequence[Path]) -> list[Path]:
    """The notebooks of this name, else of this number, else those that begin so."""

    def number_and_topic(path: Path) -> tuple[str, str]:
        number, _, topic = path.stem.partition("_")
        return number, topic

    found = [path for path in paths if typed in (path.stem, number_and_topic(path)[1])]
    if found or not typed:
        return found
    if typed.isdigit():
        numbers = [(path, number_and_topic(path)[0]) for path in paths]
        return [path for path, number in numbers if number.isdigit() and int(number) == int(typed)]
    return [
        path
        for path in paths
        if path.stem.startswith(typed) or number_and_topic(path)[1].startswith(typed)
    ]


def source_hash(notebook: dict | str | Path) -> str:
    """The hash of a notebook's code (the list of its code cells' sources).

    It is kept in the notebook's metadata (`"memlab": {"source_hash": ...}`) when the notebook is
    run in place, so that outputs that are older than their code can be told.
    """
    if isinstance(notebook, (str, Path)):
        notebook = read(notebook)
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def runs(cell: dict, tag: str | None) -> bool:
    """Whether a cell is one of code, and carries the tag if there is one."""
    return cell["cell_type"] == "code" and (tag is None or tag in cell["metadata"].get("tags", ()))


def count_cells(path: Path, tag: str | None = None) -> int:
    """The code cells of a notebook that will run; 0 if it cannot be read, of which `run` tells."""
    try:
        cells = read(path)["cells"]
        return sum(runs(cell, tag) and bool("".join(cell["source"]).strip()) for cell in cells)
    except (OSError, ValueError, KeyError):
        return 0


def strip(notebook: dict) -> None:
    """Remove what must not be committed: widgets and their state, time stamps, this machine's
    Python version.

    Cell ids and execution counts stay. A widget's view without its state is a dead reference, so it
    goes, and with it an output that has nothing else to show; a figure or a text beside it stays.
    """
    metadata = notebook["metadata"]
    metadata.pop("widgets", None)
    metadata["kernelspec"] = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    metadata.get("language_info", {}).pop("version", None)
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
        if cell["cell_type"] == "code":
            cell["outputs"] = [shown for shown in cell["outputs"] if _remains(shown)]


def _remains(output: dict) -> bool:
    """Take the widget's view out of an output, and say whether anything is left to show."""
    data = output.get("data", {})
    view = data.pop("application/vnd.jupyter.widget-view+json", None)
    return view is None or bool(set(data) - {"text/plain"})
