"""What is generated: the blocks in README.md, its like and the notebooks, and README's figures."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from memlab import will_it_fit
from memlab.course import cards, lessons_table, overviews, tables
from memlab.course.material import FIGURES, Material, gather
from memlab.course.notebook import lesson, read, written
from memlab.course.predicted import in_one_line, predictions_table
from memlab.course.watched import watched_table
from memlab.course.zoo import zoo_table
from memlab.results import Results, replace
from memlab.results.watched import load_watched

#: The documents that have generated blocks, and the blocks that each has to have.
DOCUMENTS = {
    "README.md": ("validation", "map", "lessons", "three_factors", "address"),
    "CHEATSHEET.md": ("cheatsheet",),
    "results/README.md": (
        *("results", "summary", "claims", "gpu", "gpu_summary", "predictions", "zoo", "watched"),
    ),
}

NOTHING = "Nothing is recorded yet."


# The blocks: each is made of the material, for a document in the folder `base` --------------------


def _results(material: Material, base: Path) -> str:
    return "\n\n".join(map(tables.results_table, material.files)) or NOTHING


def _on_a_gpu_in_small(data: Results) -> bool:
    """A GPU's file of the course's own sizes; GPT-2's is of the scale "large"."""
    scales = {record.scale for record in data.records}
    return data.environment.device == "cuda" and "large" not in scales


def _summary(material: Material, base: Path, on_a_gpu: bool = False) -> str:
    shown = [data for data in material.files if _on_a_gpu_in_small(data) == on_a_gpu]
    summaries = [overviews.summary_table(data, material.lessons, base) for data in shown]
    return "\n\n".join(summaries) or NOTHING


def _cheat_sheet(material: Material, base: Path) -> str:
    if not material.files:
        return NOTHING
    table = lessons_table.cheat_sheet(
        material.files, material.lessons, material.short, material.root, base
    )
    return table or NOTHING


def _gpu(material: Material, base: Path) -> str:
    parts = (material.picture("gpu-figure", base), tables.gpu_table(material.files))
    return "\n\n".join(filter(None, parts))


def _claims(material: Material, base: Path) -> str:
    table = overviews.claims_table(material.files, material.lessons, base)
    return table or "No claim is tested yet."


def _zoo(material: Material, base: Path) -> str:
    return zoo_table(material.zoo) if material.zoo is not None else NOTHING


def _map(material: Material, base: Path) -> str:
    colab = None
    if material.address and base == material.root:
        there = material.address.removeprefix("https://github.com/")
        colab = f"https://colab.research.google.com/github/{there}/blob/main"
    return overviews.map_table(material.short, base, colab, material.lessons)


def _address(material: Material, base: Path) -> str:
    if not material.address:
        return (
            "- **Colab:** this repository has no public address yet. Set it in pyproject.toml under"
            " `[project.urls]`, and\n  `make address` writes a link for each notebook into the"
            " table below."
        )
    return (
        "- **Colab:** open a notebook there by its link in the table below; its first cell installs"
        " memlab and leaves\n  Colab's own PyTorch as it is. Elsewhere: `pip install"
        f" git+{material.address}`."
    )


BLOCKS: dict[str, Callable[[Material, Path], str]] = {
    "figure": lambda material, base: material.picture("readme-figure", base),
    "gpu": _gpu,
    "address": _address,
    "map": _map,
    "lessons": lambda material, base: lessons_table.lessons_table(
        material.short, material.root, base
    ),
    "three_factors": lambda material, base: lessons_table.three_factors(material.root),
    "summary": _summary,
    "gpu_summary": lambda material, base: _summary(material, base, on_a_gpu=True),
    "cheatsheet": _cheat_sheet,
    "results": _results,
    "claims": _claims,
    "predictions": lambda material, base: predictions_table(material.predictions),
    "validation": lambda material, base: in_one_line(material.predictions),
    "zoo": _zoo,
    "watched": lambda material, base: watched_table(load_watched(material.root)),
    "will_it_fit": lambda material, base: will_it_fit.card(will_it_fit.load()),
}

#: Blocks of a lesson, made of what its own metadata name.
OF_A_LESSON = {"card": cards.card, "three_numbers": cards.three_numbers}


# Writing ------------------------------------------------------------------------------------------


def generate(root: Path, check: bool = False) -> list[str]:
    """Write what is generated: the blocks of the documents and of the notebooks, and README's
    figures.

    A block stands between `<!-- memlab:NAME:begin -->` and `<!-- memlab:NAME:end -->`, in a
    document (`DOCUMENTS` says which have to have which) or in a Markdown cell of a notebook.
    `BLOCKS` has the names.

    Args:
        root: the checkout.
        check: write nothing, and say what differs.

    Returns:
        The files that were written; with `check`, a description of every difference.

    Raises:
        FileNotFoundError: a document is not there.
        ValueError: a results file is not valid, markers are missing, or a record is of a notebook
            that is not there.
    """
    root = Path(root)
    for document in DOCUMENTS:
        if not (root / document).is_file():
            raise FileNotFoundError(
                f"there is no {document} in {root}: the tables would have no place"
            )
    material = gather(root)

    # Nothing is written before everything is known to be right.
    writes: dict[Path, bytes] = {}
    differences = []
    filled = [_document(root / name, blocks, material) for name, blocks in DOCUMENTS.items()]
    notebooks = [*material.lessons, *material.short]
    filled += [_notebook(each.path, material) for each in notebooks]
    for path, content, difference in filled:
        if difference:
            writes[path] = content.encode()
            differences += difference
    for tag, (content, _) in material.pictures.items():
        path = root / FIGURES[tag]
        if not path.is_file() or path.read_bytes() != content:
            differences.append(f"{FIGURES[tag]} is not the picture that the notebook shows")
            writes[path] = content
    if check:
        return differences
    for path, content in writes.items():
        replace(path, content)
    return [path.relative_to(root).as_posix() for path in writes]


def _document(path: Path, blocks: Sequence[str], material: Material) -> tuple[Path, str, list[str]]:
    """A document with its blocks filled: its path, its new text, and what differs."""
    old = path.read_text(encoding="utf-8")
    name = path.relative_to(material.root).as_posix()
    for block in blocks:
        if f"<!-- memlab:{block}:begin -->" not in old:
            raise ValueError(
                f"{name} has no <!-- memlab:{block}:begin --> and <!-- memlab:{block}:end -->"
            )
    new = fill(old, path, material)
    return path, new, _difference(old, new, name)


def _notebook(path: Path, material: Material) -> tuple[Path, str, list[str]]:
    """A notebook with the blocks of its Markdown cells filled."""
    name = path.relative_to(material.root).as_posix()
    notebook = read(path)
    differences = []
    for cell in notebook["cells"]:
        old = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and (new := fill(old, path, material)) != old:
            cell["source"] = new.splitlines(keepends=True)
            differences += _difference(old, new, name)
    return path, written(notebook), differences


def _difference(old: str, new: str, name: str) -> list[str]:
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), name, "as generated", n=0, lineterm=""
    )
    return [] if old == new else ["\n".join(lines)]


def fill(text: str, path: Path, material: Material) -> str:
    """Put what is generated between every pair of markers in the text of the file at `path`.

    Raises:
        ValueError: a marker stands alone, or there is no such block.
    """
    pattern = re.compile(r"(<!-- memlab:(\w+):begin -->\n).*?(<!-- memlab:\2:end -->)", re.DOTALL)
    pairs = pattern.findall(text)
    if 2 * len(pairs) != len(re.findall(r"<!-- memlab:\w+:(?:begin|end) -->", text)):
        raise ValueError(
            f"{path.relative_to(material.root).as_posix()}: a marker stands alone. A block begins"
            " with a line <!-- memlab:NAME:begin --> and ends with a line <!-- memlab:NAME:end -->"
        )

    def filled(match: re.Match) -> str:
        if match[2] in OF_A_LESSON:
            content = OF_A_LESSON[match[2]](lesson(path), material.root)
        elif match[2] in BLOCKS:
            content = BLOCKS[match[2]](material, path.parent)
        else:
            raise ValueError(f"<!-- memlab:{match[2]}:begin -->: there is no such block")
        return match[1] + (f"{content}\n" if content else "") + match[3]

    return pattern.sub(filled, text)
