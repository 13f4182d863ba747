"""What `make doctor` says: what this machine is, and whether the meter measures right on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from memlab import results
from memlab.measure import measure
from memlab.meters.device import free_bytes, resolve_device
from memlab.techniques.mixed_precision import bf16_support
from memlab.timing import time_step
from memlab.units import format_bytes
from memlab.watch import watch
from memlab.workloads import gpt
from memlab.workloads.scale import Scale, scale

#: The meter may cost this much of a step (in times the step), if the step takes a second or more.
OVERHEAD_LIMIT = 1.3

#: What the notebooks import or need to run, and what for.
OPTIONAL = {
    "nbclient": "runs the notebooks",
    "nbformat": "reads and writes the notebooks",
    "ipykernel": "the notebooks' kernel",
    "jupyterlab": "where the notebooks are read",
    "sklearn": "the real images (scikit-learn)",
}


def run(version: str, step_seconds: float = 1.0, repeats: int = 3) -> int:
    """Print what this machine is and whether the meter measures right on it.

    Args:
        version: memlab's.
        step_seconds: how long the step for the meter's overhead should take, about.
        repeats: how many of these steps are timed with the meter, and without.

    Returns:
        0 if the meter measures right, else 1.
    """
    sizes = scale()
    device = sizes.device
    about = results.environment(Path(__file__).parents[2], device)
    name = f"{device}: {about.gpu}, driver {about.driver or '-'}" if about.gpu else str(device)
    _line("memlab", f"{version}, commit {about.commit or '- (not in a git checkout)'}")
    _line("python", f"{about.python}, torch {about.torch}, {about.threads} threads")
    _line("device", name)
    _line("free memory", free_memory(device))
    _line("scale", str(sizes).removeprefix("Scale "))
    _line("BF16", bf16_support(device))
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if find_spec(name) is None]
    if missing:
        _line("missing", ", ".join(missing) + ": pip install 'memlab[course]'")
    else:
        _line("packages", "all that the notebooks need")
    right, words = self_check(device)
    _line("meter", words)
    _line("overhead", "timing a GPT step, about ten seconds ...")
    _line("", overhead(step_seconds, repeats))
    return 0 if right else 1


def _line(name: str, text: str) -> None:
    print(f"{name:<12} {text}".replace("\n", f"\n{'':<13}"), flush=True)


def free_memory(device: torch.device) -> str:
    """How much memory is free on the device, in words."""
    known = free_bytes(device)
    if known is None:
        return "not known (psutil is not installed)"
    free, total = known
    return f"{format_bytes(free)} of {format_bytes(total)}"


def self_check(device: torch.device) -> tuple[bool, str]:
    """Measure allocations whose bytes are known. Whether the meter is right to the byte, and what
    to say of it.
    """
    # Multiples of 512 bytes: CUDA's allocator hands out nothing smaller.
    held = 5 * 2**20 + 512
    briefly = 3 * 2**20 + 1024
    expected = held + briefly

    def build() -> Callable[[], None]:
        kept = torch.empty(held, dtype=torch.uint8, device=device)

        def step() -> None:
            torch.empty(briefly, dtype=torch.uint8, device=kept.device)

        return step

    measured = measure(build, device=device).peak_bytes
    said = f"{expected:,} bytes allocated, {measured:,} bytes measured"
    if measured == expected:
        return True, f"OK: {said}"
    return False, f"WRONG: {said}. The numbers here cannot be trusted"


# What the meter costs -----------------------------------------------------------------------------


def overhead(step_seconds: float = 1.0, repeats: int = 3) -> str:
    """Time a GPT training step with the meter and without, and say what the meter costs.

    The batch grows until a step takes about `step_seconds` or the device's planned batch is
    reached.
    """
    sizes = scale()
    device = resolve_device(sizes.device)
    batch, largest = 1, sizes.batch_size
    if sizes.memory_bytes is None:
        # No GPU's memory to plan for. The course's GPT needs about 15 MiB a sequence, so 128 of
        # them stay below 2 GiB.
        batch, largest = 8, 128
    with torch.device(device):
        model = gpt.GPT(sizes.gpt)
    optimizer = torch.optim.AdamW(model.parameters())

    def timed(count: int) -> list[float]:
        return _step_seconds(model, optimizer, sizes, batch, count)

    timed(1)  # the first step makes the optimizer's state and warms caches
    while (seconds := timed(1)[0]) < 0.9 * step_seconds and batch < largest:
        batch = min(largest, max(2 * batch, math.ceil(batch * step_seconds / seconds)))
    without = timed(repeats)
    began = time.perf_counter()
    with watch(model, optimizer) as watched:
        metered = timed(repeats)
    beside = time.perf_counter() - began - sum(metered)
    # The fastest of some steps is the one that other programs disturbed least.
    return (
        f"{min(metered) / min(without):.2f} x: a step takes {min(metered):.3f} s with the meter,"
        f" {min(without):.3f} s without (the fastest of {repeats} each; batch {batch} x"
        f" {sizes.sequence_length}).\nBeside the steps, {beside:.1f} s to begin and to read"
        f" {len(watched.measurement.ledger.blocks):,} allocations."
        + _judged(without, metered, step_seconds)
    )


def _step_seconds(
    model: gpt.GPT,
    optimizer: torch.optim.Optimizer,
    sizes: Scale,
    batch: int,
    count: int,
) -> list[float]:
    """The seconds of some steps of `batch` sequences."""
    device = next(model.parameters()).device
    tokens = torch.randint(sizes.gpt.vocabulary_size, (batch, sizes.sequence_length), device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(tokens, tokens).backward()
        optimizer.step()

    return [time_step(step, device) for _ in range(count)]


def _judged(without: list[float], metered: list[float], step_seconds: float) -> str:
    """What to think of the times, on a line of its own; nothing where all is well."""
    ratio = min(metered) / min(without)
    if ratio < 0.95 or max(without) > OVERHEAD_LIMIT * min(without):
        return (
            f"\nNot to be relied on: the steps took {min(without):.3f} to {max(without):.3f} s"
            f" without the meter, {min(metered):.3f} to {max(metered):.3f} s with it. Is something"
            " else running on this machine?"
        )
    if min(without) < 0.9 * step_seconds:
        return (
            f"\nThis step is short: the limit of {OVERHEAD_LIMIT} x is for steps of a second or"
            " more."
        )
    if ratio > OVERHEAD_LIMIT:
        return f"\nThat is more than the {OVERHEAD_LIMIT} x that the meter should cost at most."
    return ""
