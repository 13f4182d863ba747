"""What the documents are made of: the notebooks, the records, the figures, the address."""

from __future__ import annotations

import base64
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memlab.course.notebook import Lesson, in_depth, lesson, lessons, read, relative
from memlab.results import Predictions, Results, load_all, load_predictions
from memlab.results.zoo import ZOO, Zoo, load_zoo

#: README.md's figures, by the tag of the cell whose output they are: what opens it, and the
#: capstone on a GPU.
FIGURES = {"readme-figure": "results/figures/headline.png", "gpu-figure": "results/figures/gpu.png"}

#: A figure is described in one sentence; who reads with the ears has no way to skip.
LONGEST_DESCRIPTION = 250


@dataclass(frozen=True)
class Material:
    """What the blocks are made of. `lessons` are the notebooks in depth, which have the records;
    `short` are those that people begin with. `pictures` is by tag: the bytes of a PNG, and its
    description.
    `address` is the repository's public one, None while it has none. `predictions` is None where
    nothing is predicted, `zoo` where it has not run.
    """

    root: Path
    lessons: Sequence[Lesson]
    files: Sequence[Results]
    pictures: dict[str, tuple[bytes, str]]
    address: str | None
    predictions: Predictions | None
    zoo: Zoo | None = None
    short: Sequence[Lesson] = ()

    def picture(self, tag: str, base: Path) -> str:
        """A figure in Markdown, empty where no notebook shows one."""
        if tag not in self.pictures:
            return ""
        return f"![{self.pictures[tag][1]}]({relative(self.root / FIGURES[tag], base)})"


def gather(root: Path) -> Material:
    """Read the notebooks, the records and the address of a checkout.

    Raises:
        ValueError: a results file is not valid, or a record is of a notebook that is not there.
    """
    paths = in_depth(root)
    files = load_all(root)
    recorded = {each.notebook for data in files for each in [*data.records, *data.claims]}
    if strangers := sorted(recorded - {path.stem for path in paths}):
        raise ValueError(
            "results/ has records of notebooks that are not there:"
            f" {', '.join(map(repr, strangers))}"
        )
    pictures = {tag: shown for tag in FIGURES if (shown := figure_of(paths, tag))}
    at_zoo = Path(root) / "results" / ZOO
    return Material(
        root,
        [lesson(path) for path in paths],
        files,
        pictures,
        address(root),
        load_predictions(root),
        load_zoo(at_zoo) if at_zoo.is_file() else None,
        [lesson(path) for path in lessons(root)],
    )


def figure_of(paths: Sequence[Path], tag: str = "readme-figure") -> tuple[bytes, str] | None:
    """One of README's figures: the picture that the cell with this tag shows in a notebook, and the
    first sentence of its words.

    It is the picture of the committed run, byte for byte: it cannot show anything that was not
    measured.

    Raises:
        ValueError: more than one cell has the tag, or the sentence is too long to be listened to.
    """
    cells = [cell for path in paths for cell in read(path)["cells"]]
    found = []
    for cell in cells:
        if tag in cell["metadata"].get("tags", ()):
            shown = [output.get("data", {}) for output in cell.get("outputs", ())]
            found += [data for data in shown if "image/png" in data][:1]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"more than one cell is tagged {tag}: README.md has one such figure")
    words = " ".join("".join(found[0]["text/plain"]).split())
    sentence = re.split(r"(?<=\.) ", words, maxsplit=1)[0]
    if len(sentence) > LONGEST_DESCRIPTION:
        raise ValueError(
            f"the figure tagged {tag} is described in {len(sentence)} characters, more than"
            f" {LONGEST_DESCRIPTION}: shorten its title, {sentence!r:.80}"
        )
    return base64.b64decode(found[0]["image/png"]), sentence


def address(root: Path) -> str | None:
    """The repository's public address in pyproject.toml; None while it is the placeholder's."""
    file = root / "pyproject.toml"
    if not file.is_file():
        return None
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    return None if "/OWNER/" in address else address
