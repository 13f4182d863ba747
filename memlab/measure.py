"""`measure(run)`: the memory that a training run needs, from its first byte on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from memlab.budget import active_budget
from memlab.holders import Holder, find_holders
from memlab.join import add_steps, measurement_of
from memlab.measurement import Measurement
from memlab.meters import refusals
from memlab.meters.device import resolve_device
from memlab.meters.live import live_storages, objects_set_aside
from memlab.meters.recording import Recording
from memlab.meters.steps import StepCounter
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
    counter = StepCounter(by_hand=True)
    with refusals.backward_of_nothing_refused(), recording, counter:
        losses, holders = _take_steps(recording, counter, run, options, steps)
    recorded = recording.recorded
    measurement = measurement_of(recorded)
    refusals.refuse_nothing_to_train(recorded)
    counter.leave_out_trials(recorded.spans)
    add_steps(measurement, recorded, counter.counted)
    measurement.holders = holders if measurement.verdict.kind == "creep" else ()
    measurement.losses = tuple(losses) if len(losses) == steps else None
    refusals.refuse_leaks(recorded, measurement.ledger, live_storages(device).keys())
    if budget is not None and budget.device == device:
        budget.check(measurement, alive_before)
    return measurement


def _take_steps(
    recording: Recording,
    counter: StepCounter,
    run: Callable,
    options: Mapping[str, object],
    steps: int,
) -> tuple[list[float], tuple[Holder, ...]]:
    """Build the run, take its steps and free it.

    Returns:
        The losses of the steps that returned one, and who holds what grew.
    """
    losses: list[float] = []
    alive_after: list[Collection[int]] = []
    started = start_run(run, options)
    try:
        if started.builds_in_first_step:
            recording.begin_steps_at_first_call()
        else:
            recording.begin_steps()
        for number in range(steps):
            result = recording.run_step(started.step)
            loss = loss_of(result)
            if loss is not None:
                losses.append(loss)
            del result
            counter.end_step()
            if steps - number <= 3:
                alive_after.append(set(live_storages(recording.device)))
        recording.observer.seen.look_around(after=True)
        holders = _holders_of_growth(alive_after, recording.device)
    finally:
        started.close()
    gc.collect()
    return losses, holders


def _holders_of_growth(
    alive_after: Sequence[Collection[int]], device: torch.device
) -> tuple[Holder, ...]:
    """Who holds what the last step but one made, and the last one left there.

    Args:
        alive_after: the addresses that tensors held after each of the last three steps.
        device: where they are.
    """
    if len(alive_after) < 3:
        return ()
    before, made, left = (set(addresses) for addresses in alive_after)
    grown = (made & left) - before
    return tuple(find_holders(grown, device=device)) if grown else ()
