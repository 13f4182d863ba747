"""In what something was measured: the device, the libraries, the commit, the date."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from memlab.meters.device import environment as measured_environment
from memlab.results.models import Environment


def environment(root: Path, device: object = None) -> Environment:
    """Return what a result depends on: device, libraries, the checkout's commit, the date (UTC).

    Args:
        root: the checkout.
        device: where it is measured; by default CUDA if there is a device, else the CPU.
    """
    return of_measurement(measured_environment(device), commit(root))


def of_measurement(measured: Mapping[str, object], commit: str | None = None) -> Environment:
    """Return the environment that a measurement names, with a commit and today's date (UTC)."""
    today = datetime.now(UTC).date().isoformat()
    return Environment(**{"commit": commit, "date": today} | dict(measured))


def commit(root: Path) -> str | None:
    """Return the commit of the checkout in `root`; None outside of one.

    It ends in `-dirty` where tracked files differ from the commit.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return ended.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != Path(root).resolve():
            # memlab lies inside somebody else's repository, whose commit says nothing about it.
            return None
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None
