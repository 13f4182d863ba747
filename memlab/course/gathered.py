"""Where the records of a run of notebooks go: one file for the benchmark, one for the lessons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memlab import results
from memlab.results import Claim, Record
from memlab.results.lessons import LESSONS
from memlab.workloads.scale import scale


def files_of(folder: Path, root: Path, in_place: bool) -> dict[bool, Gathered]:
    """By whether a notebook is a lesson: the file of its records."""
    return {
        False: Gathered(folder / "results", root, in_place),
        True: Gathered(folder / LESSONS, root, in_place),
    }


class Gathered:
    """The results file of a run, which grows with each notebook."""

    def __init__(self, folder: Path, root: Path, in_place: bool) -> None:
        sizes = scale()
        # Now: the run itself makes the checkout's files differ from its commit.
        self.environment = results.environment(root, sizes.device)
        self.file = folder / results.file_name(self.environment, sizes.name)
        self.data = None
        if in_place and self.file.is_file():
            self.data = results.load(self.file)
        elif not in_place:
            self.file.unlink(missing_ok=True)  # `build` holds what the latest run recorded

    def add(self, name: str, records: Sequence[Record | Claim]) -> str:
        """Keep what a notebook recorded. Returns what to say of records that are left out.

        A file is about one device. With a single GPU notebook 05 runs its ranks on the CPU, for
        example.

        Args:
            name: the notebook's.
            records: what it recorded and claimed, in order.
        """
        device = self.environment.device
        kept = [each for each in records if each.environment.device == device]
        self.data = results.merge(self.data, self.environment, name, kept)
        results.write(self.file, self.data)
        left_out = len(records) - len(kept)
        if not left_out:
            return ""
        return (
            f"{name}: {left_out} of its records are not about {device}, and not kept in"
            f" {self.file.name}"
        )
