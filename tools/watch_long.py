"""What it costs to watch a long training: host memory, and time.

    python tools/watch_long.py --steps 10000 --layers 8 --width 64 --batch 64

Prints one line: the same loop without and with `watch`. No test asserts a time; run it on a machine
that has nothing else to do.
"""

from __future__ import annotations

import argparse
import time

import psutil
import torch
from torch import nn

from memlab import watch


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    asked = parser.parse_args()

    torch.set_num_threads(1)
    process = psutil.Process()
    train(asked.layers, asked.width, asked.batch, 20)
    plain = train(asked.layers, asked.width, asked.batch, asked.steps)
    with watch() as warm_up:
        train(asked.layers, asked.width, asked.batch, 3)
    assert warm_up.measurement.steps

    before = process.memory_info().rss
    with watch() as watched:
        seconds = train(asked.layers, asked.width, asked.batch, asked.steps)
        ended = time.perf_counter()
    at_the_end = time.perf_counter() - ended
    grown = process.memory_info().rss - before
    full = sum(step.peak_bytes is not None for step in watched.measurement.steps)
    print(
        f"{asked.steps} steps of {1000 * plain / asked.steps:.2f} ms: watched"
        f" {1000 * seconds / asked.steps:.2f} ms ({seconds / plain:.2f} x), {at_the_end:.2f} s at"
        f" the end, {grown / 2**20:.1f} MiB more resident; {full} steps recorded in full."
        f" {watched.measurement.verdict.sentence}"
    )


if __name__ == "__main__":
    main()
