"""What is generated from the records: the tables of README.md and of results/README.md, and
README's figures.
"""

from __future__ import annotations

import base64
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from memlab.results import environment_of, load_all, replace
from memlab.units import format_bytes

#: README.md's figures, by the tag of the cell whose output they are: what opens it, and the
#: capstone on a GPU.
FIGURES = {"readme-figure": "results/figures/headline.png", "gpu-figure": "results/figures/gpu.png"}

#: The documents that have generated blocks, and the blocks that each has to have.
DOCUMENTS = {
    "README.md": ("map", "summary"),
    "CHEATSHEET.md": ("cheatsheet",),
    "results/README.md": ("results", "claims"),
}


# Tables -------------------------------------------------------------------------------------------


def notebooks(root: Path) -> list[Path]:
    """The course's notebooks in their order: the core, then the electives."""
    folder = Path(root) / "notebooks"
    return [
        *sorted(folder.glob("[!.]*.ipynb")),
        *sorted((folder / "electives").glob("[!.]*.ipynb")),
    ]


def rows(one: dict) -> list[dict[str, str]]:
    """A record in words: for each variant its name, predicted, measured, residual, times less,
    seconds.
    """
    baseline = one["variants"][0]["peak_bytes"]
    table = []
    for variant in one["variants"]:
        predicted, measured, seconds = (
            variant["predicted_bytes"],
            variant["peak_bytes"],
            variant["seconds"],
        )
        table.append(
            {
                "variant": variant["name"],
                "predicted": format_bytes(predicted),
                "measured": format_bytes(measured),
                "residual": (
                    "-" if predicted is None else _percent(100 * (measured - predicted) / predicted)
                ),
                "× less": f"{baseline / measured:.2f}",
                "seconds (spread)": (
                    "-" if seconds is None else f"{seconds['median']:.3g} ({seconds['spread']:.2g})"
                ),
            }
        )
    return table


def _percent(value: float) -> str:
    """A residual; nothing has no sign of its own."""
    return f"{value:+.2f} %".replace("-0.00", "+0.00")


def _at_most(value: float) -> str:
    """A number above zero, rounded up to one digit: 0.14 is within 2e-01."""
    exponent = math.floor(math.log10(value))
    return f"{math.ceil(round(value / 10**exponent, 6)) * 10**exponent:.0e}"


def results_table(data: dict) -> str:
    """A results file as Markdown: one line that says where it was measured, then a row
    a variant.
    """
    table = []
    for one in data["records"]:
        name = (
            one["notebook"]
            if one["technique"] in one["notebook"]
            else f"{one['notebook']}: {one['technique']}"
        )
        for number, row in enumerate(rows(one)):
            table.append({"notebook": name if number == 0 else "", **row})
    return f"{_caption(data)}\n\n{_markdown(table)}" if table else _caption(data)


def summary_table(data: dict, paths: Sequence[Path], base: Path) -> str:
    """A results file in short: for each notebook its first record, from the baseline to the last
    variant.
    """
    table = []
    for path in paths:
        records = [one for one in data["records"] if one["notebook"] == path.stem]
        if not records:
            continue
        variants = records[0]["variants"]
        before, after = variants[0], variants[-1]
        alone = len(variants) == 1
        known = [v for v in variants if v["predicted_bytes"] is not None]
        residuals = [
            100 * (v["peak_bytes"] - v["predicted_bytes"]) / v["predicted_bytes"] for v in known
        ]
        timed = not alone and _steady(before["seconds"]) and _steady(after["seconds"])
        difference = None if alone else after["max_gradient_difference"]
        title = _title(json.loads(path.read_text(encoding="utf-8"))) or path.stem
        table.append(
            {
                "notebook": f"[{title}]({_relative(path, base)})",
                "from → to": before["name"] if alone else f"{before['name']} → {after['name']}",
                "peak before": format_bytes(before["peak_bytes"]),
                "peak after": "-" if alone else format_bytes(after["peak_bytes"]),
                "× less": "-" if alone else f"{before['peak_bytes'] / after['peak_bytes']:.2f}",
                "residual": _percent(max(residuals, key=abs)) if residuals else "-",
                "× time": (
                    f"{after['seconds']['median'] / before['seconds']['median']:.2f}"
                    if timed
                    else "-"
                ),
                "gradients": (
                    "-"
                    if difference is None
                    else "equal"
                    if difference == 0
                    else f"within {_at_most(difference)}"
                ),
            }
        )
    return f"{_caption(data)}\n\n{_markdown(table)}" if table else _caption(data)


def cheat_sheet(data: dict, paths: Sequence[Path], base: Path) -> str:
    """Every technique in one row, as Markdown: what it shrinks, by how much here, what it costs,
    when to leave it.

    The numbers are those of each notebook's first record in a results file. The words are in the
    notebook's metadata:
    `"memlab": {"column": "activations", "exact": "yes", "leave": "the batch is small"}`. A notebook
    without them has no row.
    """
    table = []
    for path in paths:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        about = notebook.get("metadata", {}).get("memlab", {})
        records = [one for one in data["records"] if one["notebook"] == path.stem]
        if not records or not about.get("leave"):
            continue
        before, after = records[0]["variants"][0], records[0]["variants"][-1]
        timed = _steady(before["seconds"]) and _steady(after["seconds"])
        name = _title(notebook).partition("·")[2].strip() or path.stem
        columns = [about["column"]] if isinstance(about["column"], str) else about["column"]
        table.append(
            {
                "technique": f"[{name}]({_relative(path, base)})",
                "shrinks": ", ".join(columns).replace("_", " "),
                "here": f"{before['name']} → {after['name']}",
                "× less": f"{before['peak_bytes'] / after['peak_bytes']:.2f}",
                "× time": (
                    f"{after['seconds']['median'] / before['seconds']['median']:.2f}"
                    if timed
                    else "-"
                ),
                "exact?": about.get("exact", "-"),
                "leave it when": about["leave"],
            }
        )
    return f"{_caption(data)}\n\n{_markdown(table)}" if table else _caption(data)


def _steady(seconds: dict | None) -> bool:
    """Whether a step was timed, and its times lie within half of their median: else the machine was
    busy.
    """
    return seconds is not None and seconds["spread"] <= 0.5 * seconds["median"]


def claims_table(files: Sequence[dict], paths: Sequence[Path], base: Path) -> str:
    """Every claim that the notebooks tested, with its verdict, as Markdown. Devices that disagree
    are named.
    """
    by_number: dict[int, list[tuple[str, dict]]] = {}
    for data in files:
        for one in data.get("claims", []):
            device = environment_of(data, one)["gpu"] or "CPU"
            by_number.setdefault(one["number"], []).append((device, one))
    table = []
    for number, tested in sorted(by_number.items()):
        devices: dict[str, list[str]] = {}
        for device, one in tested:
            devices.setdefault(one["verdict"], []).append(device)
        verdicts = [
            verdict if len(devices) == 1 else f"{', '.join(dict.fromkeys(where))}: {verdict}"
            for verdict, where in devices.items()
        ]
        _, first = tested[0]
        table.append(
            {
                "": str(number),
                "the article says": first["says"],
                "verdict": f"**{'; '.join(verdicts)}**",
                "what was found": first["found"],
                "notebook": _link_to_need(first["notebook"], paths, base),
            }
        )
    return _markdown(table)


def gpu_table(files: Sequence[dict]) -> str:
    """What the capstone's recipe needs on a GPU, in small pieces and in large ones, and how long a
    step takes.
    """
    parts = []
    for data in files:
        for one in data["records"]:
            if data["environment"]["device"] != "cuda" or one["technique"] != "larger pieces":
                continue
            first, table = one["variants"][0], []
            for variant in one["variants"]:
                timed = _steady(first["seconds"]) and _steady(variant["seconds"])
                seconds = variant["seconds"]["median"] if timed else None
                table.append(
                    {
                        "": variant["name"],
                        "peak": format_bytes(variant["peak_bytes"]),
                        "× less": f"{first['peak_bytes'] / variant['peak_bytes']:.1f}",
                        "seconds a step": f"{seconds:.3f}" if timed else "-",
                        "× time": f"{seconds / first['seconds']['median']:.2f}" if timed else "-",
                    }
                )
            parts += [_caption(data), _markdown(table)]
        for one in data["records"]:
            if data["environment"]["device"] == "cuda" and one["technique"] == "in 8 GiB":
                sizes = one["sizes"]
                trained = "; ".join(
                    f"{v['name']}: {format_bytes(v['peak_bytes'])}" for v in one["variants"]
                )
                tokens = f"{sizes['batch_size']} × {sizes['sequence_length']:,} tokens"
                parts.append(f"In a budget of 8 GiB, {tokens} a step: {trained}.")
    return "\n\n".join(parts)


def _caption(data: dict) -> str:
    """Where and when a results file was measured, in one line."""
    environments = [environment_of(data, one) for one in data["records"]] or [data["environment"]]

    def all_of(key: str) -> list[str]:
        return sorted({str(each[key]) for each in environments})

    dates, own = all_of("date"), data["environment"]
    memory = "" if own["gpu_bytes"] is None else f", {format_bytes(own['gpu_bytes'])}"
    threads = " or ".join(all_of("threads"))
    where = own["gpu"] or f"CPU, {threads} thread{'s' * (threads != '1')}"
    scales = sorted({one["scale"] for one in data["records"]})
    return (
        f"**{where}{memory}** (torch {', '.join(all_of('torch'))}; scale"
        f" {', '.join(scales) or '-'}; measured"
        f" {' to '.join(dict.fromkeys((dates[0], dates[-1])))})"
    )


def map_table(paths: Sequence[Path], base: Path, colab: str | None = None) -> str:
    """The map of the notebooks as Markdown, from their titles and their metadata; links are
    relative to `base`.

    With `colab`, the address at which Google Colab opens what lies in `base`, each notebook has a
    link to it there.

    A notebook's metadata say `"memlab": {"minutes": 20, "needs": ["00"], "column": "activations"}`;
    what is needed is a notebook (its number or its name), or words.
    """
    table = []
    for path in paths:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        about = notebook.get("metadata", {}).get("memlab", {})
        column = about.get("column") or "-"
        columns = [column] if isinstance(column, str) else column
        needs = [_link_to_need(str(need), paths, base) for need in about.get("needs", [])]
        table.append(
            {
                "": path.stem.split("_")[0],
                "notebook": f"[{_title(notebook) or path.stem}]({_relative(path, base)})",
                "column": ", ".join(columns).replace("_", " "),
                "minutes": str(about.get("minutes") or "-"),
                "read first": ", ".join(needs) or "-",
                **({"open in": f"[Colab]({colab}/{_relative(path, base)})"} if colab else {}),
            }
        )
    return _markdown(table)


def _link_to_need(need: str, paths: Sequence[Path], base: Path) -> str:
    for path in paths:
        number, _, topic = path.stem.partition("_")
        if need in (path.stem, number, topic):
            return f"[{number}]({_relative(path, base)})"
    return need


def _relative(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path, base)).as_posix()


def _title(notebook: dict) -> str:
    for cell in notebook.get("cells", []):
        found = re.search(r"^# +(.+)$", "".join(cell["source"]), flags=re.MULTILINE)
        if cell["cell_type"] == "markdown" and found:
            return found[1].strip()
    return ""


def _markdown(table: list[dict[str, str]]) -> str:
    """Rows as a Markdown table; columns of numbers, whose headings stand in the tuple, are set to
    the right.
    """
    if not table:
        return ""
    right = (
        "predicted",
        "measured",
        "residual",
        "× less",
        "seconds (spread)",
        "minutes",
        "peak before",
        "peak after",
        "× time",
        "peak",
        "seconds a step",
    )
    lines = [list(table[0]), ["---:" if heading in right else "---" for heading in table[0]]]
    lines += [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in row.values()] for row in table
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# What is generated --------------------------------------------------------------------------------


def figure_of(paths: Sequence[Path], tag: str = "readme-figure") -> tuple[bytes, str] | None:
    """One of README's figures: the picture that the cell with this tag shows in a notebook, and its
    words.

    It is the picture of the committed run, byte for byte: it cannot show anything that was not
    measured.

    Raises:
        ValueError: more than one cell has the tag.
    """
    found = []
    for path in paths:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if tag in cell["metadata"].get("tags", ()):
                shown = [
                    one for one in cell.get("outputs", ()) if "image/png" in one.get("data", {})
                ]
                found += [
                    (base64.b64decode(one["data"]["image/png"]), one["data"]["text/plain"])
                    for one in shown[:1]
                ]
    if len(found) > 1:
        raise ValueError(f"more than one cell is tagged {tag}: README.md has one such figure")
    return (found[0][0], "".join(found[0][1])) if found else None


def generate(root: Path, check: bool = False) -> list[str]:
    """Write what is generated: the blocks of the documents and of the notebooks, and README's
    figures.

    A block stands between `<!-- memlab:NAME:begin -->` and `<!-- memlab:NAME:end -->`, in a
    document (`DOCUMENTS` says which have to have which) or in a Markdown cell of a notebook. The
    names: `gpu` (the capstone on a GPU), `map` (the notebooks), `summary` (a row a notebook),
    `results` (everything that was measured), `claims` (the verdicts), `cheatsheet` (a row a
    technique), `figure` (README's first figure, with its alternative text).

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
    paths, files = notebooks(root), load_all(root)
    for document in DOCUMENTS:
        if not (root / document).is_file():
            raise FileNotFoundError(
                f"there is no {document} in {root}: the tables would have no place"
            )
    recorded = {
        one["notebook"] for data in files for one in [*data["records"], *data.get("claims", [])]
    }
    if strangers := sorted(recorded - {path.stem for path in paths}):
        raise ValueError(
            "results/ has records of notebooks that are not there:"
            f" {', '.join(map(repr, strangers))}"
        )
    pictures = {tag: shown for tag in FIGURES if (shown := figure_of(paths, tag))}
    colab = _colab(root)

    def picture(tag: str, base: Path) -> str:
        return (
            f"![{pictures[tag][1]}]({_relative(root / FIGURES[tag], base)})"
            if tag in pictures
            else ""
        )

    def block(name: str, base: Path) -> str:
        if name == "results":
            return "\n\n".join(results_table(data) for data in files) or "Nothing is recorded yet."
        if name == "summary":
            return (
                "\n\n".join(summary_table(data, paths, base) for data in files)
                or "Nothing is recorded yet."
            )
        if name == "cheatsheet":
            return cheat_sheet(files[0], paths, base) if files else "Nothing is recorded yet."
        if name == "gpu":
            return "\n\n".join(
                part for part in (picture("gpu-figure", base), gpu_table(files)) if part
            )
        if name == "claims":
            return claims_table(files, paths, base) or "No claim is tested yet."
        if name == "map":
            return map_table(paths, base, colab if base == root else None)
        if name == "figure":
            return picture("readme-figure", base)
        raise ValueError(f"<!-- memlab:{name}:begin -->: there is no such block")

    writes: dict[Path, bytes] = {}  # nothing is written before everything is known to be right
    differences = []

    def fill_in(path: Path, old: str) -> str:
        name = path.relative_to(root).as_posix()
        new = fill(old, lambda block_name: block(block_name, path.parent), name)
        if new != old:
            lines = difflib.unified_diff(
                old.splitlines(), new.splitlines(), name, "as generated", n=0, lineterm=""
            )
            differences.append("\n".join(lines))
        return new

    for document, names in DOCUMENTS.items():
        old = (root / document).read_text(encoding="utf-8")
        for name in names:
            if f"<!-- memlab:{name}:begin -->" not in old:
                raise ValueError(
                    f"{document} has no <!-- memlab:{name}:begin --> and <!-- memlab:{name}:end -->"
                )
        if (new := fill_in(root / document, old)) != old:
            writes[root / document] = new.encode()
    for path in paths:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            old = "".join(cell["source"])
            if cell["cell_type"] == "markdown" and (new := fill_in(path, old)) != old:
                cell["source"] = new.splitlines(keepends=True)
                # As nbformat writes it, so that a run in place changes no more than it has to.
                writes[path] = (
                    json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
                ).encode()
    for tag, (content, _) in pictures.items():
        path = root / FIGURES[tag]
        if not path.is_file() or path.read_bytes() != content:
            differences.append(f"{FIGURES[tag]} is not the picture that the notebook shows")
            writes[path] = content
    if check:
        return differences
    for path, content in writes.items():
        replace(path, content)
    return [path.relative_to(root).as_posix() for path in writes]


def _colab(root: Path) -> str | None:
    """Where Google Colab opens the checkout's files: its public address is in pyproject.toml (None
    without one).
    """
    file = root / "pyproject.toml"
    if not file.is_file():
        return None
    address = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    return (
        address.replace("https://github.com/", "https://colab.research.google.com/github/")
        + "/blob/main"
    )


def fill(text: str, block: Callable[[str], str], place: str) -> str:
    """Put `block(name)` between every pair of markers of that name in a text.

    Raises:
        ValueError: a marker stands alone.
    """
    pattern = re.compile(r"(<!-- memlab:(\w+):begin -->\n).*?(<!-- memlab:\2:end -->)", re.DOTALL)
    found = pattern.findall(text)
    if 2 * len(found) != len(re.findall(r"<!-- memlab:\w+:(?:begin|end) -->", text)):
        raise ValueError(
            f"{place}: a marker stands alone. A block begins with a line <!-- memlab:NAME:begin -->"
            " and ends with a line <!-- memlab:NAME:end -->"
        )

    def replaced(match: re.Match) -> str:
        content = block(match[2])
        return match[1] + (f"{content}\n" if content else "") + match[3]

    return pattern.sub(replaced, text)
