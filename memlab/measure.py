"""`measure(run)`: the memory that a training run needs, from its first byte on."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

from memlab.budget import active_budget
from memlab.measurement import Measurement, measurement_of
from memlab.meters import refusals
from memlab.meters.device import resolve_device
from memlab.meters.live import live_storages, objects_set_aside
from memlab.meters.recording import Recording
from memlab.run import check_run, loss_of, start_run
from memlab.timing import time_together


def measure(
    run: Callable,
    *,
    steps: int = 2,
    repeats: int = 0,
    device: str | torch.device | None = None,
    lines: bool = False,
    **options: object,
) -> Measurement:
    """Measure the memory that a training run needs, from its first byte on.

    Example:
        def train(checkpointing=False):
            model = ...
            for tokens, targets in batches:
                loss = model(tokens, targets)
                ...
                yield loss

        before = measure(train)
        after = measure(train, checkpointing=True)

    Args:
        run: a generator function that trains: what comes before its first `yield` builds, each
            `yield` ends a step, and what it yields is the loss. Or a function that makes everything
            the run needs (model, optimizer, batch) and returns the step to call. Either is called
            inside the measurement, so the ledger starts at zero and sees the model being built.
        steps: how many steps are taken. Two show the steady state: from the second step on, the
            optimizer's state is there.
        repeats: how many steps to time as well, in a separate run with nothing switched on (one
            more warms up, unless a step takes ten seconds or more).
        device: `"cpu"` or `"cuda"`; by default CUDA if there is a device, else the CPU.
        lines: whether each block gets the line of your code that made it (`Block.line`). Costs some
            microseconds a call of PyTorch; the bytes are the same.
        **options: keywords for the run.

    Returns:
        A `Measurement`: the peak, its columns, the timeline, seconds, losses.

    Raises:
        ValueError: something given cannot be measured; the message says what and what to do.
        RuntimeError: another measurement, or PyTorch's profiler, is running.
        MemoryLeakError: something outside the run still holds memory that was allocated in it.
        OverBudget: a `memlab.budget` around this call was passed (a `torch.OutOfMemoryError`).
    """
    check_run(run, options)
    for name, value, least in (("steps", steps, 1), ("repeats", repeats, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} has to be a whole number of at least {least}, not {value!r}")
    device = resolve_device(device)

    with objects_set_aside():
        measurement = _measure(run, options, steps, device, lines)
        if repeats:
            timed = time_together({"": run}, repeats, device=device, options=options)
            measurement.seconds = timed[""]
    return measurement


def _measure(
    run: Callable, options: Mapping[str, object], steps: int, device: torch.device, lines: bool
) -> Measurement:
    budget = active_budget()
    alive_before = budget.alive() if budget is not None else 0
    recording = Recording(device, collect=budget is not None, lines=lines)
    step_ends: list[int] = []
    try:
        with recording:
            losses = _take_steps(recording, run, options, steps, step_ends)
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise ValueError(
                "the step calls backward on a loss that needs no gradient. Is every parameter"
                " frozen, or does the model run under torch.no_grad()?"
            ) from error
        raise
    recorded = recording.recorded
    measurement = measurement_of(recorded)
    refusals.refuse_nothing_to_train(recorded)
    if recorded.readings.complete:
        ledger = measurement.ledger
        measurement.bytes_after_step = tuple(
            sum(ledger.columns_at(moment).values()) for moment in step_ends
        )
    measurement.losses = tuple(losses) if len(losses) == steps else None
    refusals.refuse_leaks(recorded, measurement.ledger, live_storages(device).keys())
    if budget is not None and budget.device == device:
        budget.check(measurement, alive_before)
    return measurement


def _take_steps(
    recording: Recording,
    run: Callable,
    options: Mapping[str, object],
    steps: int,
    step_ends: list[int],
) -> list[float]:
    """Build the run, take its steps and free it; the losses of those that returned one."""
    losses: list[float] = []
    started = start_run(run, options)
    try:
        if started.builds_in_first_step:
            recording.begin_steps_at_first_call()
        else:
            recording.begin_steps()
        for _ in range(steps):
            result = recording.run_step(started.step)
            loss = loss_of(result)
            if loss is not None:
                losses.append(loss)
            del result
            step_ends.append(time.time_ns())
        recording.observer.seen.look_around(after=True)
    finally:
        started.close()
    gc.collect()
    return losses
