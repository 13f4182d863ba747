"""Seconds of a training step: from runs of their own, with nothing switched on."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from memlab.meters.device import resolve_device, synchronize
from memlab.run import start_run

# Seconds. A step that takes so long needs no other one before it that warms up.
_LONG_STEP = 10.0


class Seconds(NamedTuple):
    """Seconds of one step: the median of `repeats` steps, and their spread.

    The spread is the slowest less the fastest.
    """

    median: float
    spread: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median:.4g} s (spread {self.spread:.2g} s over {self.repeats})"


def time_step(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, with the device's work done before and after.

    Args:
        step: a function without arguments.
        device: the device that it works on.
    """
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - began


def time_together(
    runs: Mapping[str, Callable],
    repeats: int = 5,
    *,
    device: str | torch.device | None = None,
    options: Mapping[str, object] | None = None,
) -> dict[str, Seconds]:
    """Time steps of several runs in turn, so that a slow moment of the machine falls on all alike.

    The first step of each warms up. It counts only if it takes ten seconds or more.

    Args:
        runs: name -> run, as for `memlab.measure`.
        repeats: how many steps of each are timed.
        device: the device that they work on; by default CUDA if there is a device, else the CPU.
        options: keywords for every run.

    Returns:
        The median and the spread of each run's steps, by name.

    Raises:
        ValueError: `repeats` is below 1, or one of the runs cannot be started.
    """
    if repeats < 1:
        raise ValueError(f"repeats has to be at least 1, not {repeats}")
    device = resolve_device(device)
    started = {name: start_run(run, dict(options or {})) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for turn in range(repeats + 1):
            for name, run in started.items():
                if len(times[name]) == repeats:
                    continue
                builds_too = turn == 0 and run.builds_in_first_step
                seconds = time_step(run.step, device)
                warms_up = turn == 0 and (builds_too or seconds < _LONG_STEP)
                if not warms_up:
                    times[name].append(seconds)
    finally:
        for run in started.values():
            run.close()
        started.clear()
        gc.collect()
    return {
        name: Seconds(statistics.median(taken), max(taken) - min(taken), repeats)
        for name, taken in times.items()
    }
