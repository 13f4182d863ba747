"""What it costs to watch a long training: one file for each kind of device, in results/watched/."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from memlab.forms import Bytes, Count, Model, Text, in_words, replace
from memlab.results.files import file_name
from memlab.results.models import Environment, NotNegative


class WatchedRun(Model):
    """One loop, without `watch` and with it.

    Attributes:
        steps, layers, width, batch: the loop, of so many linear layers.
        seconds_a_step: without.
        watched_seconds_a_step: with it.
        enter_seconds, exit_seconds: how long its `with` takes to begin, and to end.
        resident_bytes: what the process has grown by, from before it to after it.
        recorded: how many steps were recorded in full.
        verdict: what it said.
        environment: when it was run, and on what.
    """

    steps: Count
    layers: Count
    width: Count
    batch: Count
    seconds_a_step: NotNegative
    watched_seconds_a_step: NotNegative
    enter_seconds: NotNegative
    exit_seconds: NotNegative
    resident_bytes: Bytes
    recorded: Count
    verdict: Text
    environment: Environment

    @property
    def loop(self) -> tuple[int, int, int, int]:
        """What tells it from other loops."""
        return self.steps, self.layers, self.width, self.batch


class Watched(Model):
    """What such a file holds."""

    runs: list[WatchedRun]


def folder_of(root: Path) -> Path:
    """Where the files are, in a checkout."""
    return Path(root) / "results" / "watched"


def load_watched(root: Path) -> list[WatchedRun]:
    """All runs of a checkout.

    Raises:
        ValueError: a file is not valid; the message says where.
    """
    runs: list[WatchedRun] = []
    for path in sorted(folder_of(root).glob("*.json")):
        try:
            runs += Watched.model_validate_json(path.read_bytes()).runs
        except ValidationError as error:
            raise ValueError(f"{path.name}: {in_words(error)}") from error
    return runs


def keep_watched(root: Path, run: WatchedRun) -> Path:
    """Put a run into the file of its device, in the place of an older one of the same loop.

    Returns:
        The file.
    """
    path = folder_of(root) / file_name(run.environment)
    others = []
    if path.is_file():
        others = [old for old in load_watched(root) if old.loop != run.loop]
        others = [old for old in others if file_name(old.environment) == path.name]
    runs = sorted([*others, run], key=lambda kept: kept.loop)
    replace(path, Watched(runs=runs).model_dump_json(indent=2) + "\n")
    return path
