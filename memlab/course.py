"""Runs the notebooks and gathers what they record: the notebooks are the benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from memlab import results
from memlab.report import notebooks, rows
from memlab.units import format_bytes
from memlab.workloads import scale

__all__ = [
    "Outcome",
    "find_root",
    "notebooks",
    "run",
    "select",
    "source_hash",
    "strip",
    "summary",
    "table",
]


# What nbclient would log, `Outcome.error` says.
_quiet = logging.getLogger(f"{__name__}.nbclient")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


@dataclass
class Outcome:
    """How one notebook's run ended.

    Attributes:
        notebook: the notebook that was run.
        seconds: how long it took, the kernel's start included.
        records: what it recorded: objects with `environment` and `record` or `claim`.
        error: what went wrong, in one line; empty when all went well.
        cell: where it went wrong: the cell's number as Jupyter shows it, None if no cell is to
            blame.
        copy: the executed copy, if one was written.
    """

    notebook: Path
    seconds: float = 0.0
    records: list[dict] = field(default_factory=list)
    error: str = ""
    cell: int | None = None
    copy: Path | None = None

    @property
    def failed(self) -> bool:
        """Whether the notebook did not run to its end."""
        return bool(self.error)

    def __str__(self) -> str:
        line = f"{self.notebook.stem:<32} {self.seconds:6.1f} s  "
        if not self.failed:
            return f"{line}ok"
        return f"{line}FAILED{'' if self.cell is None else f' in cell [{self.cell}]'}: {self.error}"


def find_root() -> Path:
    """The checkout: that of this package, else the one in or above the current folder.

    Raises:
        FileNotFoundError: memlab is installed without its notebooks, and the current folder is in
            no checkout.
    """
    folders = [Path(__file__).resolve().parents[1], Path.cwd(), *Path.cwd().parents]
    for folder in folders:
        if (folder / "notebooks").is_dir() and (folder / "memlab" / "course.py").is_file():
            return folder
    raise FileNotFoundError(
        "the notebooks are not here: memlab is installed without them. Clone the repository and run"
        " this in it."
    )


def select(names: Sequence[str], root: Path) -> list[Path]:
    """The notebooks that people mean by "03", "3", "gradient_checkpointing", "03_grad" or a path;
    all of them by nothing.

    Raises:
        ValueError: a name is no notebook's, or that of several.
    """
    paths = notebooks(root)
    chosen = []
    for name in names:
        file, stem = Path(name), Path(name).name.removesuffix(".ipynb")
        if file.suffix == ".ipynb" and file.is_file():
            found = [file.resolve()]
        else:
            found = [p for p in paths if stem in (p.stem, p.stem.partition("_")[2])]
            if not found and stem.isdigit():
                found = [
                    p
                    for p in paths
                    if p.stem.split("_")[0].isdigit() and int(p.stem.split("_")[0]) == int(stem)
                ]
            if not found and stem and not stem.isdigit():
                found = [
                    p
                    for p in paths
                    if p.stem.startswith(stem) or p.stem.partition("_")[2].startswith(stem)
                ]
        if len(found) != 1:
            what = "is the beginning of several notebooks" if found else "is no notebook"
            listed = "\n  ".join(path.stem for path in found or paths)
            raise ValueError(f"{name!r} {what}. There {'match' if found else 'are'}:\n  {listed}")
        chosen += [path for path in found if path not in chosen]
    return chosen if names else paths


def source_hash(notebook: dict | str | Path) -> str:
    """The hash of a notebook's code (the list of its code cells' sources).

    It is kept in the notebook's metadata (`"memlab": {"source_hash": ...}`) when the notebook is
    run in place, so that outputs that are older than their code can be told.
    """
    if isinstance(notebook, (str, Path)):
        notebook = json.loads(Path(notebook).read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def run(
    notebooks: Iterable[str | Path],
    *,
    in_place: bool = False,
    output: str | Path | None = None,
    timeout: int = 600,
    root: Path | None = None,
    cells: str | None = None,
) -> list[Outcome]:
    """Run notebooks, each in its folder and with a kernel of this very Python, and gather their
    records.

    A notebook that fails does not keep the next from running; it is printed with its cell and its
    error, and its records are left out. The executed copies go to `output`/notebooks and the
    records to `output`/results: nothing else in the checkout changes.

    Args:
        notebooks: the notebooks to run.
        in_place: write the outputs into the notebooks themselves, without what must not be
            committed (`strip`), and the records into `results/`, each in place of the notebook's
            old ones. A notebook that fails stays as it was.
        output: the folder for copies and records; by default `build` in the checkout.
        timeout: seconds that one cell may take.
        root: the checkout; by default `find_root()`.
        cells: run only the code cells with this tag, in their order. Then `in_place` is about the
            records alone: a notebook of which a part was run is not written.

    Raises:
        ModuleNotFoundError: nbclient is not installed.
        ValueError: with `in_place`, the results file that is there is not valid.
    """
    try:
        import nbclient  # noqa: F401 - asked for here, so that it is missing before the first notebook, not in it
        import nbformat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, and it takes it to run notebooks: pip install"
            " 'memlab[course]'"
        ) from error
    root = find_root() if root is None else Path(root)
    output = root / "build" if output is None else Path(output).resolve()
    sizes = scale()
    environment = results.environment(
        root, sizes.device
    )  # now: the run itself makes the checkout's files differ
    file = (root if in_place else output) / "results" / results.file_name(environment, sizes.name)
    data = None
    if in_place:
        data = results.load(file) if file.is_file() else None
    else:
        file.unlink(missing_ok=True)  # `build` holds what the latest run recorded
    outcomes = []
    books = [(Path(path).resolve(), _count(path, cells)) for path in notebooks]
    with tqdm(
        total=sum(count for _, count in books), unit="cell", disable=None, leave=False
    ) as bar:
        done = 0
        for path, count in books:
            outcome, notebook = _run_one(path, timeout, bar, cells)
            done += count
            bar.update(done - bar.n)  # the cells that a failure left out
            if in_place and not outcome.failed and cells is None:
                strip(notebook)
                notebook.metadata.setdefault("memlab", {})["source_hash"] = source_hash(notebook)
                outcome.copy = path
            elif notebook is not None:
                outcome.copy = output / "notebooks" / _place(path, root)
            if notebook is not None:
                results.replace(
                    outcome.copy,
                    nbformat.writes(notebook, version=nbformat.NO_CONVERT).rstrip() + "\n",
                )
            if not outcome.failed:
                # A file is about one device. With a single GPU notebook 05 runs its ranks on the
                # CPU, for example.
                device = environment["device"]
                own = [line for line in outcome.records if line["environment"]["device"] == device]
                if len(own) < len(outcome.records):
                    others = len(outcome.records) - len(own)
                    bar.write(
                        f"{path.stem}: {others} of its records are not about {device}, and not kept"
                        f" in {file.name}"
                    )
                data = results.merge(data, environment, path.stem, own)
                results.write(file, data)
            outcomes.append(outcome)
            bar.write(str(outcome))
    return outcomes


def _runs(cell: dict, tag: str | None) -> bool:
    """Whether a cell is one of code, and carries the tag if there is one."""
    return cell["cell_type"] == "code" and (tag is None or tag in cell["metadata"].get("tags", ()))


def _count(path: str | Path, tag: str | None = None) -> int:
    """The code cells of a notebook that will run (0 if it cannot be read, of which `_run_one`
    tells).
    """
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        return sum(_runs(cell, tag) and bool("".join(cell["source"]).strip()) for cell in cells)
    except (OSError, ValueError, KeyError):
        return 0


def _place(path: Path, root: Path) -> Path:
    """Where a notebook's copy goes below `output`/notebooks: as in the checkout."""
    folder = (root / "notebooks").resolve()
    return path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)


def _run_one(path: Path, timeout: int, bar: tqdm, cells: str | None = None):
    """Run one notebook. How it ended, and the executed notebook (None if it could not be read)."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    outcome = Outcome(path)
    began = time.perf_counter()
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:  # nbformat's errors are ValueErrors
        outcome.error = f"cannot be read: {_first_line(str(error))}"
        return outcome, None
    if cells is not None:
        notebook.cells = [cell for cell in notebook.cells if _runs(cell, cells)]
        if not notebook.cells:
            outcome.error = f"no code cell has the tag {cells!r}"
            return outcome, None

    class Kernel(AsyncKernelManager):
        """A kernel that stops at Ctrl-C and remembers it: nbclient would tell no more than that the
        kernel died.
        """

        interrupted = False

        async def start_kernel(self, **options: object) -> None:
            with contextlib.suppress(RuntimeError):  # in a thread there are no signals
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.interrupt_run)
            await super().start_kernel(**options)

        def interrupt_run(self) -> None:
            self.interrupted = True
            self.stopping = asyncio.ensure_future(self.shutdown_kernel(now=True))

    class Client(NotebookClient):
        """Shows beside the bar what a cell printed last: a long one tells how far it is."""

        def process_message(self, message: dict, cell: dict, index: int) -> object:
            if message["msg_type"] == "stream" and (text := message["content"]["text"].strip()):
                bar.set_postfix_str(re.split(r"[\r\n]+", text)[-1][:80])
            return super().process_message(message, cell, index)

    number = 0

    def on_cell(**_: object) -> None:
        nonlocal number
        number += 1
        bar.set_description(f"{path.stem} [{number}]")

    def after_cell(**_: object) -> None:
        bar.update()

    with tempfile.TemporaryDirectory(prefix="memlab-") as folder:
        lines = Path(folder) / "records.jsonl"
        # With no folder to look for kernels in, what is left is this Python's own, whatever else is
        # registered here.
        kernel = Kernel(
            kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
        )
        client = Client(
            notebook,
            km=kernel,
            timeout=timeout,
            record_timing=False,
            store_widget_state=False,
            log=_quiet,
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_execute=on_cell,
            on_cell_executed=after_cell,
        )
        try:
            # What a kernel says of itself on standard error is no part of the notebook.
            client.execute(
                cleanup_kc=True, env=_kernel_environment(lines), stderr=subprocess.DEVNULL
            )
        except CellExecutionError as error:
            outcome.error = f"{error.ename}: {_first_line(error.evalue)}"
        except CellTimeoutError:
            outcome.error = f"took longer than {timeout} s"
        except DeadKernelError:
            outcome.error = "the kernel died (out of memory?)"
        except (
            AssertionError
        ) as error:  # nbclient's own, while it tidies up after a kernel that died
            if not isinstance(error.__context__, DeadKernelError):
                raise
            outcome.error = "the kernel died (out of memory?)"
        except RuntimeError as error:  # the kernel did not start
            outcome.error = _first_line(str(error))
        if kernel.interrupted:
            raise KeyboardInterrupt
        if outcome.failed:
            outcome.cell = number or None
        else:
            outcome.records = results.read_lines(lines)
            strangers = {
                line.get("record", line.get("claim"))["notebook"] for line in outcome.records
            } - {path.stem}
            if strangers:
                outcome.error = (
                    f"it records under another notebook's name: {', '.join(sorted(strangers))}"
                )
                outcome.records = []
    outcome.seconds = time.perf_counter() - began
    return outcome, notebook


def _kernel_environment(lines: Path) -> dict[str, str]:
    """The environment of a kernel: it records to `lines`, and it finds memlab in a checkout that is
    not installed.
    """
    environment = {**os.environ, results.VARIABLE: str(lines), "PYTHONDONTWRITEBYTECODE": "1"}
    source = Path(__file__).resolve().parents[1]
    if (source / "pyproject.toml").is_file():
        others = [part for part in [os.environ.get("PYTHONPATH")] if part]
        environment["PYTHONPATH"] = os.pathsep.join([str(source), *others])
    return environment


def _first_line(text: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    return plain.splitlines()[0] if plain else ""


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
        if cell["cell_type"] != "code":
            continue
        kept = []
        for shown in cell["outputs"]:
            data = shown.get("data", {})
            if data.pop("application/vnd.jupyter.widget-view+json", None) is None or set(data) - {
                "text/plain"
            }:
                kept.append(shown)
        cell["outputs"] = kept


def table(records: Sequence[dict], committed: dict | None = None) -> str:
    """Records in words, a line a variant, with the committed measurement beside each where there is
    one.

    Args:
        records: records of this run.
        committed: the committed results file of the same kind of device, if there is one.
    """
    lines = []
    for position, one in enumerate(records):
        old = _same(records, position, committed)
        peaks = (
            {variant["name"]: variant["peak_bytes"] for variant in old["variants"]} if old else {}
        )
        other_sizes = old is not None and (old["scale"], old["sizes"]) != (
            one["scale"],
            one["sizes"],
        )
        for number, (row, variant) in enumerate(zip(rows(one), one["variants"], strict=True)):
            then = format_bytes(peaks.get(variant["name"]))
            lines.append(
                {
                    "notebook": one["notebook"] if number == 0 else "",
                    **row,
                    "committed": "other sizes" if other_sizes else then,
                }
            )
    if not lines:
        return "Nothing was recorded."
    cells = [list(lines[0]), *(list(line.values()) for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    texts = ("notebook", "variant")
    return "\n".join(
        "  ".join(
            cell.ljust(width) if heading in texts else cell.rjust(width)
            for cell, width, heading in zip(line, widths, cells[0], strict=True)
        ).rstrip()
        for line in cells
    )


def _same(records: Sequence[dict], position: int, committed: dict | None) -> dict | None:
    """The committed record of the same comparison: a notebook's n-th record of a technique is its
    n-th there, too.
    """

    def like(all_of_them: Iterable[dict]) -> list[dict]:
        key = (records[position]["notebook"], records[position]["technique"])
        return [one for one in all_of_them if (one["notebook"], one["technique"]) == key]

    number = len(like(records[:position]))
    there = like(committed["records"]) if committed else []
    return there[number] if number < len(there) else None


def summary(outcomes: Sequence[Outcome]) -> str:
    """How a run ended: how many notebooks, how long, and what failed where."""
    failed = [outcome for outcome in outcomes if outcome.failed]
    seconds = sum(outcome.seconds for outcome in outcomes)
    count = len(outcomes)
    lines = [f"{count} notebook{'s' * (count != 1)} in {seconds:.0f} s, {len(failed)} failed"]
    for outcome in failed:
        where = "" if outcome.cell is None else f", cell [{outcome.cell}]"
        lines.append(f"  {outcome.notebook.name}{where}: {outcome.error}")
        if outcome.copy is not None:
            lines.append(f"    the copy with its outputs: {outcome.copy}")
    return "\n".join(lines)
