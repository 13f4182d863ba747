"""What it costs to watch a long training: host memory, and time.

    python tools/watch_long.py --steps 10000 --layers 8 --width 64 --batch 64 --record

Prints one line: the same loop without and with `watch`; `--record` keeps it in results/watched/,
from which `make report` makes a table. No test asserts a time; run it on a machine that has nothing
else to do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from memlab import watch
from memlab.results.environments import environment
from memlab.results.watched import WatchedRun, keep_watched

ROOT = Path(__file__).resolve().parents[1]


def train(layers: int, width: int, batch: int, steps: int) -> float:
    """Train for a number of steps. Returns the seconds that they took."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    began = time.perf_counter()
    for _ in range(steps):
        model(torch.randn(batch, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def measured(steps: int, layers: int, width: int, batch: int) -> WatchedRun:
    """Run the loop without `watch`, and with it."""
    process = psutil.Process()
    train(layers, width, batch, 20)
    plain = train(layers, width, batch, steps)
    with watch() as warm_up:
        train(layers, width, batch, 3)
    assert warm_up.measurement.steps

    before = process.memory_info().rss
    moments = [time.perf_counter()]
    with watch() as watched:
        moments.append(time.perf_counter())
        seconds = train(layers, width, batch, steps)
        moments.append(time.perf_counter())
    moments.append(time.perf_counter())
    grown = process.memory_info().rss - before
    measurement = watched.measurement
    return WatchedRun(
        steps=steps,
        layers=layers,
        width=width,
        batch=batch,
        seconds_a_step=plain / steps,
        watched_seconds_a_step=seconds / steps,
        enter_seconds=moments[1] - moments[0],
        exit_seconds=moments[3] - moments[2],
        resident_bytes=max(0, grown),
        recorded=sum(step.peak_bytes is not None for step in measurement.steps),
        verdict=measurement.verdict.sentence,
        environment=environment(ROOT, torch.device("cpu")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--record", action="store_true", help="keep it in results/watched/")
    asked = parser.parse_args()

    torch.set_num_threads(1)
    run = measured(asked.steps, asked.layers, asked.width, asked.batch)
    ratio = run.watched_seconds_a_step / run.seconds_a_step
    print(
        f"{run.steps} steps of {1000 * run.seconds_a_step:.2f} ms: watched"
        f" {1000 * run.watched_seconds_a_step:.2f} ms ({ratio:.2f} x), {run.enter_seconds:.2f} s at"
        f" the beginning, {run.exit_seconds:.2f} s at the end, {run.resident_bytes / 2**20:.1f} MiB"
        f" more resident; {run.recorded} steps recorded in full. {run.verdict}"
    )
    if asked.record:
        print(f"kept in {keep_watched(ROOT, run).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
