"""The commands: `python -m memlab measure | report | doctor`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

import memlab
from memlab import course, report, results
from memlab.meters.device import resolve_device
from memlab.workloads import gpt, scale

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0 all is well, 1 something failed, 2 it was called
    wrongly.
    """
    parser = argparse.ArgumentParser(
        prog="python -m memlab", description=__doc__, epilog=memlab.__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    measure = commands.add_parser(
        "measure", help="run the notebooks on this machine's device and print what they measured"
    )
    measure.add_argument(
        "notebooks", nargs="*", help="which: 03, gradient_checkpointing or a path (all by default)"
    )
    measure.add_argument(
        "--in-place",
        action="store_true",
        help="write the outputs into the notebooks and the records into results/",
    )
    measure.add_argument(
        "--output", type=Path, metavar="DIR", help="where copies and records go (default: build)"
    )
    measure.add_argument(
        "--cells",
        metavar="TAG",
        help="run only the cells with this tag; the notebooks stay as they are",
    )
    measure.add_argument(
        "--timeout",
        type=int,
        default=600,
        metavar="S",
        help="seconds a cell may take (default: 600)",
    )

    report = commands.add_parser(
        "report",
        help="write the generated tables into README.md, results/README.md and the notebooks",
    )
    report.add_argument(
        "--check",
        action="store_true",
        help="write nothing; say what differs, and fail if anything does",
    )

    commands.add_parser(
        "doctor", help="show the device, its scale, and whether the meter measures right here"
    )

    given = parser.parse_args(arguments)
    try:
        if given.command == "measure":
            return run_measure(
                given.notebooks, given.in_place, given.output, given.cells, given.timeout
            )
        if given.command == "report":
            return run_report(given.check)
        return run_doctor()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"python -m memlab {given.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run_measure(
    names: Sequence[str],
    in_place: bool = False,
    output: Path | None = None,
    cells: str | None = None,
    timeout: int = 600,
) -> int:
    """Run notebooks and print this machine's numbers beside the committed ones. 1 if a notebook
    failed, else 0.
    """
    root = course.find_root()
    chosen = course.select(names, root)
    if not chosen:
        print(f"there are no notebooks in {root / 'notebooks'}", file=sys.stderr)
        return 1
    sizes = scale()
    print(sizes, flush=True)
    file = root / "results" / results.file_name(results.environment(root, sizes.device), sizes.name)
    committed = results.load(file) if file.is_file() else None  # now: a run in place replaces it
    outcomes = course.run(
        chosen, in_place=in_place, output=output, timeout=timeout, root=root, cells=cells
    )
    print()
    lines = [line for outcome in outcomes for line in outcome.records]
    print(course.table([line["record"] for line in lines if "record" in line], committed))
    print()
    print(course.summary(outcomes))
    return int(any(outcome.failed for outcome in outcomes))


def run_report(check: bool = False) -> int:
    """Write the generated tables, or with `check` say what differs. 1 if anything
    differs, else 0.
    """
    changed = report.generate(course.find_root(), check=check)
    if check and changed:
        print("\n".join(changed))
        print("\nThese differ from the records. Run: python -m memlab report")
        return 1
    print("\n".join(f"written: {name}" for name in changed) or "everything is as the records say")
    return 0


# Doctor -------------------------------------------------------------------------------------------


def run_doctor(step_seconds: float = 1.0, repeats: int = 3) -> int:
    """Print what this machine is and whether the meter measures right on it. 1 if it does not, else
    0.

    Args:
        step_seconds: how long the step for the meter's overhead should take, about.
        repeats: how many of these steps are timed with the meter, and without.
    """
    sizes = scale()
    device = sizes.device

    def line(name: str, text: str) -> None:
        print(f"{name:<12} {text}".replace("\n", f"\n{'':<13}"), flush=True)

    about = results.environment(Path(memlab.__file__).parents[1], device)
    line("memlab", f"{memlab.__version__}, commit {about['commit'] or '- (not in a git checkout)'}")
    line("python", f"{about['python']}, torch {about['torch']}, {about['threads']} threads")
    line(
        "device",
        (
            f"{device}: {about['gpu']}, driver {about['driver'] or '-'}"
            if about["gpu"]
            else str(device)
        ),
    )
    line("free memory", free_memory(device))
    line("scale", str(sizes).removeprefix("Scale "))
    line("BF16", bf16(device))
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if find_spec(name) is None]
    if missing:
        line("missing", ", ".join(missing) + ": pip install 'memlab[course]'")
    else:
        line("packages", "all that the notebooks need")
    right, text = self_check(device)
    line("meter", text)
    line("overhead", "timing a GPT step, about ten seconds ...")
    line("", overhead(step_seconds, repeats))
    return 0 if right else 1


def free_memory(device: torch.device) -> str:
    """How much memory is free on the device, in words."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        try:
            import psutil
        except ModuleNotFoundError:
            return "not known (psutil is not installed)"
        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    return f"{memlab.format_bytes(free)} of {memlab.format_bytes(total)}"


def bf16(device: torch.device) -> str:
    """Whether the device computes in BF16 itself, in words."""
    from memlab.techniques.mixed_precision import bf16_support

    return bf16_support(device)


def self_check(device: torch.device) -> tuple[bool, str]:
    """Measure allocations whose bytes are known. Whether the meter is right to the byte, and what
    to say of it.
    """
    held, briefly = 5 * 2**20 + 1, 3 * 2**20 + 7
    grain = 512 if device.type == "cuda" else 1  # CUDA's allocator hands out multiples of 512 bytes
    expected = sum(-(-size // grain) * grain for size in (held, briefly))

    def build() -> Callable[[], None]:
        kept = torch.empty(held, dtype=torch.uint8, device=device)

        def step() -> None:
            torch.empty(briefly, dtype=torch.uint8, device=kept.device)

        return step

    measured = memlab.measure(build, device=device).peak_bytes
    if measured == expected:
        return True, f"OK: {expected:,} bytes allocated, {measured:,} bytes measured"
    return (
        False,
        (
            f"WRONG: {expected:,} bytes allocated, {measured:,} bytes measured. The numbers here"
            " cannot be trusted"
        ),
    )


def overhead(step_seconds: float = 1.0, repeats: int = 3) -> str:
    """Time a GPT training step with the meter and without, and say what the meter costs.

    The batch grows until a step takes about `step_seconds` or the device's planned batch is
    reached.
    """
    sizes = scale()
    device = resolve_device(sizes.device)
    # On a CPU the course's GPT needs about 15 MiB a sequence, so 128 of them stay below 2 GiB.
    batch, largest = (8, 128) if device.type == "cpu" else (1, sizes.batch_size)
    with torch.device(device):
        model = gpt.GPT(sizes.gpt)
    optimizer = torch.optim.AdamW(model.parameters())

    def timed(count: int) -> list[float]:
        """The seconds of some steps."""
        tokens = torch.randint(
            sizes.gpt.vocabulary_size, (batch, sizes.sequence_length), device=device
        )
        times = []
        for _ in range(count):
            _synchronize(device)
            began = time.perf_counter()
            optimizer.zero_grad()
            model(tokens, tokens).backward()
            optimizer.step()
            _synchronize(device)
            times.append(time.perf_counter() - began)
        return times

    timed(1)  # the first step makes the optimizer's state and warms caches
    while (seconds := timed(1)[0]) < 0.9 * step_seconds and batch < largest:
        batch = min(largest, max(2 * batch, math.ceil(batch * step_seconds / seconds)))
    without = timed(repeats)
    began = time.perf_counter()
    with memlab.watch(model, optimizer) as watched:
        metered = timed(repeats)
    beside = time.perf_counter() - began - sum(metered)
    # The fastest of some steps is the one that other programs disturbed least.
    ratio = min(metered) / min(without)
    text = (
        f"{ratio:.2f} x: a step takes {min(metered):.3f} s with the meter, {min(without):.3f} s"
        f" without (the fastest of {repeats} each; batch {batch} x"
        f" {sizes.sequence_length}).\nBeside the steps, {beside:.1f} s to begin and to read"
        f" {len(watched.measurement.ledger.blocks):,} allocations."
    )
    if ratio < 0.95 or max(without) > OVERHEAD_LIMIT * min(without):
        text += (
            f"\nNot to be relied on: the steps took {min(without):.3f} to {max(without):.3f} s"
            f" without the meter, {min(metered):.3f} to {max(metered):.3f} s with it. Is something"
            " else running on this machine?"
        )
    elif min(without) < 0.9 * step_seconds:
        text += (
            f"\nThis step is short: the limit of {OVERHEAD_LIMIT} x is for steps of a second or"
            " more."
        )
    elif ratio > OVERHEAD_LIMIT:
        text += f"\nThat is more than the {OVERHEAD_LIMIT} x that the meter should cost at most."
    return text


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
