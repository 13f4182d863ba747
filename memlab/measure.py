"""`measure(build)` and `watch(model, optimizer)`: the two ways to a ledger."""

from __future__ import annotations

import contextlib
import gc
import html
import platform
import statistics
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import NamedTuple

import torch
from torch import nn

from memlab.budget import active_budget, resolve_device
from memlab.ledger import (
    COLUMNS,
    Block,
    Event,
    Ledger,
    Observation,
    Span,
    Timeline,
    build_ledger,
    lives,
)
from memlab.meters.columns import Observer, Use, live_storages, objects_set_aside
from memlab.meters.cpu import Trace
from memlab.meters.cuda import CudaTrace
from memlab.units import KiB, format_bytes

# Small constants that PyTorch keeps for good once they were needed are not a leak.
_LEAK_TOLERANCE = 64 * KiB

# Seconds. A step that takes so long needs no other one before it that warms up.
_LONG_STEP = 10.0

_measuring = False


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What was recorded becomes a few hundred thousand objects: the collector would walk through
    all of them, often.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Seconds(NamedTuple):
    """Seconds of one step: the median of `repeats` steps, and their spread (slowest
    minus fastest).
    """

    median: float
    spread: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median:.4g} s (spread {self.spread:.2g} s over {self.repeats})"


class MemoryLeakError(RuntimeError):
    """Memory allocated inside a measured run was still alive after the run was over and its step
    deleted.
    """


@dataclass
class Measurement:
    """What a run needed: the peak in bytes, what the bytes were for, and when.

    Attributes:
        peak_bytes: the most bytes allocated at once during the run. Exact on the CPU; on CUDA the
            allocator's counter, less `workspace_bytes`.
        columns: bytes by column at the moment of the peak; they sum to `peak_bytes`.
        phase: the phase that held the peak: forward, backward, optimizer or other.
        reserved_bytes: the most that the allocator held from the driver, whole process (None on the
            CPU).
        device_bytes: what the driver says is in use on the whole device at the end of the run (None
            on the CPU).
        bytes_after_step: bytes alive after each step. In a loop that leaks they grow. (Empty for
            `watch`, which knows no steps.)
        seconds: median and spread of one step, from separate runs with nothing switched on (None:
            not asked for).
        losses: what each step returned, when it returned a number or a tensor with one element
            (else None).
        outside_bytes: the most bytes at once of tensors that the run used and this device's
            allocator did not hand out during it, as far as they were seen: memory maps, shared
            memory (a data loader's workers), NumPy arrays, what other threads made. Not counted in
            anything above.
        outside_memory_bytes: the same without the memory maps: files and shared memory.
        workspace_bytes: what cuBLAS held for itself, as it does for every model (None on the CPU).
            Reserved, not in the peak.
        environment: device, GPU, torch, driver, Python.
        ledger: every block with its life (`memlab.ledger.Ledger`).
    """

    peak_bytes: int
    columns: dict[str, int]
    phase: str
    ledger: Ledger
    environment: dict[str, object]
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    bytes_after_step: tuple[int, ...] = ()
    seconds: Seconds | None = None
    losses: tuple[float, ...] | None = None
    outside_bytes: int = 0
    outside_memory_bytes: int = 0
    workspace_bytes: int | None = None
    _timeline: Timeline | None = field(default=None, repr=False, compare=False)

    @property
    def timeline(self) -> Timeline:
        """Bytes by column over time."""
        if self._timeline is None:
            self._timeline = self.ledger.timeline()
        return self._timeline

    @property
    def known_bytes(self) -> int:
        """The most bytes at once without what is in no tensor: to compare two runs to the byte.

        Left out is what operators took for themselves and gave back before they were done: how much
        that is depends on the processor and on the number of threads. Left out is also what stayed
        unattributed: a GPU's allocator gives out blocks that are up to 1 MiB too large when it has
        one at hand, and whether it has depends on what went before. So two equal runs have equal
        known bytes, on any processor.
        """
        return self.ledger.known_peak_bytes

    def largest(self, count: int = 10) -> list[Block]:
        """The largest blocks alive at the peak: what they are, and which operator in which module
        made them.
        """
        return self.ledger.alive_at(self.ledger.peak_time)[:count]

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = [
            (
                name.replace("_", " "),
                format_bytes(self.columns[name]),
                f"{self.columns[name] / self.peak_bytes:6.1%}",
            )
            for name in COLUMNS
            if self.columns[name]
        ]
        return rows

    def _notes(self) -> list[str]:
        notes = []
        if self.reserved_bytes is not None:
            notes.append(
                f"allocated {format_bytes(self.peak_bytes)} · reserved"
                f" {format_bytes(self.reserved_bytes)} · device {format_bytes(self.device_bytes)}"
            )
        if self.workspace_bytes:
            notes.append(
                f"not counted: {format_bytes(self.workspace_bytes)} of workspaces that cuBLAS"
                " keeps, whatever the model"
            )
        if self.seconds is not None:
            notes.append(f"{self.seconds} a step")
        if self.losses:
            notes.append(
                "loss " + " → ".join(f"{loss:.4f}" for loss in (self.losses[0], self.losses[-1]))
            )
        if self.outside_bytes:
            notes.append(
                f"not counted: {format_bytes(self.outside_bytes)} of tensors that this allocator"
                " did not hand out (memory maps, shared memory, NumPy, other threads, or from"
                " before the run)"
            )
        return notes

    def _headline(self) -> str:
        gpu = self.environment.get("gpu")
        return (
            f"Peak {format_bytes(self.peak_bytes)} ({self.peak_bytes:,} bytes), in {self.phase}, on"
            f" {gpu or 'cpu'}"
        )

    def __str__(self) -> str:
        lines = [self._headline()]
        lines += [f"  {name:<16} {size:>12} {share}" for name, size, share in self._rows()]
        lines += [f"  {note}" for note in self._notes()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{name}</td><td>{size}</td><td>{share}</td></tr>"
            for name, size, share in self._rows()
        )
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self._notes())
        return (
            f"<div><b>{html.escape(self._headline())}</b></div><table><thead><tr><th"
            " style='text-align:left'>column</th><th>at the"
            f" peak</th><th>share</th></tr></thead><tbody>{rows}</tbody></table>{notes}"
        )


def measure(
    build: Callable[[], Callable[[], object]],
    *,
    steps: int = 2,
    repeats: int = 0,
    device: str | torch.device | None = None,
) -> Measurement:
    """Measure the memory that a training run needs, from its first byte on.

    Args:
        build: makes everything the run needs (model, optimizer, batch) and returns the step to
            call. It is called inside the measurement, so the ledger starts at zero and sees the
            model being built.
        steps: how many times the step is called. Two show the steady state: from the second step
            on, the optimizer's state is there.
        repeats: how many steps to time as well, in a separate run with nothing switched on (one
            more warms up, unless a step takes ten seconds or more).
        device: `"cpu"` or `"cuda"`; by default CUDA if there is a device, else the CPU.

    Returns:
        A `Measurement`: the peak, its columns, the timeline, seconds, losses.

    Raises:
        ValueError: something given cannot be measured; the message says what and what to do.
        RuntimeError: another measurement, or PyTorch's profiler, is running.
        MemoryLeakError: something outside the run still holds memory that was allocated in it.
        torch.OutOfMemoryError: a `memlab.budget` around this call was passed.
    """
    if isinstance(build, nn.Module):
        raise ValueError(
            "measure() was given a model. Give it a function that makes the model, the optimizer"
            " and the batch and returns the step to call; for a model that is there already, use"
            " `with watch(model, optimizer)`"
        )
    if not callable(build):
        raise ValueError(
            "build has to be a function that makes the model, the optimizer and the batch and"
            f" returns the step to call, not {_describe(build)}"
        )
    for name, value, least in (("steps", steps, 1), ("repeats", repeats, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} has to be a whole number of at least {least}, not {value!r}")
    device = resolve_device(device)

    with objects_set_aside():
        return _measure(build, steps, repeats, device)


def _measure(build: Callable, steps: int, repeats: int, device: torch.device) -> Measurement:
    recording = _Recording(device)
    losses: list[float] = []
    after: list[int] = []
    try:
        with recording:
            step = _build(build)
            recording.observer.look_around(before=True)
            for _ in range(steps):
                result = recording.run_step(step)
                loss = _number(result)
                if loss is not None:
                    losses.append(loss)
                recording.note_gradients(result)
                del result
                after.append(time.time_ns())
            recording.observer.look_around(after=True)
            del step
            gc.collect()
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise ValueError(
                "the step calls backward on a loss that needs no gradient. Is every parameter"
                " frozen, or does the model run under torch.no_grad()?"
            ) from error
        raise
    measurement = recording.measurement()
    recording.check_gradients()
    if recording.meter.complete:
        measurement.bytes_after_step = tuple(
            sum(measurement.ledger.columns_at(moment).values()) for moment in after
        )
    measurement.losses = tuple(losses) if len(losses) == steps else None
    recording.check_leaks(measurement)
    recording.check_budget(measurement)
    if repeats:
        measurement.seconds = _time(build, repeats, device)
    return measurement


class watch:  # noqa: N801 - read as a verb: `with watch(model, optimizer) as w:`
    """Measure a stretch of existing training code, in mid-life: `with watch(model, optimizer) as w:
    ...`.

    What was alive at the start is counted and its end is seen. Afterwards `w.measurement` holds the
    `Measurement` (also when the code inside raised). Begin between two iterations: of a graph that
    is alive at the start, only what Python holds is known. On the CPU the thread that enters is
    measured, as by `measure`.

    Args:
        things: any number of models and optimizers. They name what is alive at the start; models
            and optimizers that are first used inside are found without being named.
        device: `"cpu"` or `"cuda"`; by default that of the first model's parameters.

    Raises:
        ValueError: something given is neither a model nor an optimizer.
        RuntimeError: another measurement, or PyTorch's profiler, is running.
    """

    def __init__(
        self, *things: nn.Module | torch.optim.Optimizer, device: str | torch.device | None = None
    ):
        for thing in things:
            if not isinstance(thing, (nn.Module, torch.optim.Optimizer)):
                raise ValueError(f"watch() takes models and optimizers, not {_describe(thing)}")
        if device is None:
            parameters = (
                p for thing in things if isinstance(thing, nn.Module) for p in thing.parameters()
            )
            first = next(parameters, None)
            device = None if first is None or first.device.type == "meta" else first.device
        self._things = things
        self._device = resolve_device(device)
        self._measurement: Measurement | None = None
        self._refusal: Exception | None = None

    def __enter__(self) -> watch:
        self._recording = _Recording(self._device, count_alive=True)
        self._recording.__enter__()
        try:
            observer = self._recording.observer
            observer.look_around(before=True)
            for thing in self._things:
                if isinstance(thing, nn.Module):
                    for name, module in thing.named_modules():
                        observer.see_module(module, name)
                else:
                    observer.see_optimizer(thing)
            observer.see_gradients()
        except BaseException:
            self._recording.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._measurement = self._refusal = None
        try:
            self._recording.observer.look_around(after=True)
            self._recording.__exit__()
            self._measurement = self._recording.measurement()
        except (RuntimeError, ValueError) as error:
            self._refusal = error  # the training goes on: whoever asks for the measurement is told
        self._things = ()  # a finished watch keeps no model alive
        del self._recording

    @property
    def measurement(self) -> Measurement:
        """What was measured, once the `with` block has ended.

        Raises:
            RuntimeError: it has not ended, or what ran in it cannot be measured; the message says
                why.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._measurement is None:
            raise RuntimeError(
                "there is no measurement yet: read it after the `with watch(...)` block has ended"
            )
        return self._measurement


class _Recording:
    """The meter and the observer, switched on together and off together."""

    def __init__(self, device: torch.device, count_alive: bool = False):
        self.device = device
        self.observer = Observer(device)
        self.meter = CudaTrace(device) if device.type == "cuda" else Trace()
        self._count_alive = count_alive

    def __enter__(self) -> _Recording:
        global _measuring
        if _measuring:
            raise RuntimeError(
                "a measurement is running already, and there can be one at a time. Measure one run"
                " after the other."
            )
        _measuring = True
        try:
            if self._count_alive or active_budget() is not None:
                gc.collect()  # else what was alive before is not counted, and may go when it likes
            self._note_alive()
            self.meter.start()
            self.start = time.time_ns()
            self.thread = threading.get_ident()
            self.observer.__enter__()
        except BaseException:
            _measuring = False
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        global _measuring
        try:
            self.observer.__exit__()
            self.end = time.time_ns()
            with _no_garbage_collection():
                self.meter.stop()
        finally:
            _measuring = False
            # The references to storages from before have done their work.
            self._references.clear()

    def _note_alive(self) -> None:
        """Note the storages that are alive before the recording, and (to count them) see each one's
        end.
        """
        before = time.time_ns()
        self.alive: list[Block] = []
        self._references: list[weakref.ref] = []
        self._without_gradient = False
        budget = active_budget()
        self._budget_before = budget.alive() if budget is not None else 0
        if self.device.type == "cuda" and self._count_alive:
            return  # the allocator's own map says it better: CudaTrace.start() reads it
        if self.device.type == "cpu":
            self.observer.maps_before.update(live_storages(self.device, maps=True))
        for address, storage in live_storages(self.device).items():
            self.observer.before.add(address)
            if self._count_alive:
                block = Block(storage.nbytes(), address, before)

                def gone(reference: weakref.ref, block: Block = block) -> None:
                    block.died = time.time_ns()

                self.alive.append(block)
                self._references.append(weakref.ref(storage, gone))

    def run_step(self, step: Callable[[], object]) -> object:
        """Run one step, and see the gradients it leaves behind."""
        began = time.time_ns()
        result = step()
        if callable(result) and not isinstance(result, torch.Tensor):
            raise ValueError(
                "the step returned a function. Did build() return another build function, not yet"
                " called? Return what it returns: `return build_other()`."
            )
        self.observer.see_gradients()
        self.observer.stack.clear()  # of calls that something other than an Exception ended
        self.observer.spans.append(Span(began, time.time_ns(), "step"))
        return result

    def note_gradients(self, result: object) -> None:
        """Note a step that looks as if it was meant to train (a model ran with grad mode on) and
        had nothing to train.
        """
        if (
            not isinstance(result, torch.Tensor)
            or result.requires_grad
            or not self.observer.forward_with_grad
        ):
            return
        parameters = self.observer.used_parameters()
        # A loss may come back detached: that is fine as long as something needed a gradient.
        if parameters and not any(p.requires_grad or p.grad is not None for p in parameters):
            self._without_gradient = True

    def check_gradients(self) -> None:
        """Refuse such a step, unless autograd ran after all: for an input, say, through a frozen
        model.
        """
        if self._without_gradient and not any(span.kind == "backward" for span in self.meter.spans):
            raise ValueError(
                "nothing in this step needs a gradient: every parameter of the model is frozen, and"
                " yet it runs with gradients enabled. Unfreeze what is to be trained; to measure"
                " inference, run the step under torch.no_grad() or torch.inference_mode()."
            )

    @_no_garbage_collection()
    def measurement(self) -> Measurement:
        """Join what was recorded."""
        cuda = isinstance(self.meter, CudaTrace)
        alive = self.alive
        if cuda and self._count_alive:
            alive = [Block(b.bytes, b.address, self.start - 1) for b in self.meter.alive]
        spans = self.meter.spans + self.observer.spans
        ledger, missed = build_ledger(
            self.meter.events,
            self.observer.observations,
            spans,
            alive,
            start=self.start,
            end=self.end,
        )
        if not self.meter.complete:
            ledger, missed = (
                Ledger([], start=self.start, end=self.end),
                [],
            )  # half a history is none
        self._refuse_foreign_parameters(missed)
        self._refuse_other_threads()
        peak, columns = ledger.peak_bytes, ledger.peak_columns()
        if cuda:
            counted = self.meter.peak_allocated - (
                0 if self._count_alive else self.meter.allocated_before
            )
            # The counter is the truth. What the history does not explain (rounding, other
            # libraries) is unattributed.
            peak = max(counted, sum(columns.values()))
            columns["unattributed"] += peak - sum(columns.values())
        maps, others = _outside(self.meter.mapped, self.observer.uses, missed)
        return Measurement(
            peak_bytes=peak,
            columns=columns,
            phase=ledger.peak_phase,
            ledger=ledger,
            environment=environment(self.device),
            reserved_bytes=self.meter.reserved_bytes if cuda else None,
            device_bytes=self.meter.device_bytes if cuda else None,
            workspace_bytes=self.meter.workspace_bytes if cuda else None,
            outside_bytes=Ledger(maps + others).peak_bytes,
            outside_memory_bytes=Ledger(others).peak_bytes,
        )

    def _refuse_foreign_parameters(self, missed: list) -> None:
        """A model from before the measurement would be missing in the ledger without a word."""
        if self._count_alive:
            return
        foreign: dict[tuple[int, int], str] = {}
        names: dict[int, str] = {}
        for seen in missed:
            if seen.column == "parameters" and seen.address in self.observer.before:
                foreign[seen.time, seen.address] = seen.name
                names[seen.address] = names.get(seen.address) or seen.name
        # By time too: memory of a model that is gone since may be the run's own by now. What the
        # run did not use is another model that lives in this process.
        sizes = {
            use.address: use.bytes
            for use in self.observer.uses
            if (use.seen, use.address) in foreign
        }
        if sizes:
            name = next((names[address] for address in sizes if names[address]), "the optimizer's")
            raise ValueError(
                "the model was built before the measurement began:"
                f" {format_bytes(sum(sizes.values()))} of its parameters would be missing ({name!r}"
                " is one). Build it inside build(), or put `with watch(model, optimizer)` around"
                " the code you have."
            )
        devices = self.observer.devices
        if devices and self.device not in devices:
            raise ValueError(
                f"the model's parameters are on {', '.join(sorted(map(str, devices)))}, but"
                f" {self.device} is measured. Move the model in build(), or pass device=."
            )

    def _refuse_other_threads(self) -> None:
        """What a model allocates in another thread, the CPU's meter does not see."""
        elsewhere = [
            name for thread, name in self.observer.threads.items() if thread != self.thread
        ]
        if elsewhere and self.device.type == "cpu":
            raise RuntimeError(
                f"{elsewhere[0]} ran in another thread than the measurement, and on the CPU"
                " PyTorch's profiler reports the allocations of one thread only. Run the step in"
                " the thread that measures; a thread that prepares data may stay."
            )

    def check_leaks(self, measurement: Measurement) -> None:
        """After the step was deleted, nothing of the run may be alive."""
        left = [block for block in measurement.ledger.blocks if block.died is None]
        size = sum(block.bytes for block in left)
        if size > _LEAK_TOLERANCE:
            held = live_storages(self.device).keys() & {block.address for block in left}
            if self.device.type == "cpu" and not held:
                raise RuntimeError(
                    f"{format_bytes(size)} allocated in this run never came back in the thread that"
                    " measures, and yet no tensor holds them: another thread freed them, unseen by"
                    " PyTorch's profiler, and the ledger would count them for ever. Let the step"
                    " free what it makes in its own thread."
                )
            by_column: dict[str, int] = {}
            for block in left:
                by_column[block.column] = by_column.get(block.column, 0) + block.bytes
            held = ", ".join(
                f"{column} {format_bytes(count)}" for column, count in by_column.items()
            )
            raise MemoryLeakError(
                f"{format_bytes(size)} allocated in this run are still alive after it ({held}):"
                " something outside build() holds them, a global list or a variable declared"
                " nonlocal, say, or a hook on a tensor that refers to it (Python's garbage"
                " collector does not see that cycle). The next measurement would start with them."
                " Let build() return nothing but the step, keep numbers (loss.item()), not"
                " tensors, and let hooks refer to models and optimizers weakly."
            )

    def check_budget(self, measurement: Measurement) -> None:
        """The ledger also counts what operators took for themselves, which a budget on the CPU does
        not see live.
        """
        budget = active_budget()
        if budget is not None and budget.device == self.device and self.device.type == "cpu":
            largest = max(
                measurement.ledger.alive_at(measurement.ledger.peak_time),
                key=lambda b: b.born,
                default=None,
            )
            where = (
                f"{largest.operator} in {largest.module or 'the step'}" if largest else "the run"
            )
            budget.check(measurement.peak_bytes + self._budget_before, where, measurement.columns)


def _outside(
    mapped: list[Event], uses: list[Use], missed: list[Observation]
) -> tuple[list[Block], list[Block]]:
    """What was used and is not the allocator's, each with its life: memory maps, and what else fell
    on no block.
    """
    maps = lives(mapped)
    unseen = {(observation.time, observation.address) for observation in missed}
    others = [
        Block(use.bytes, use.address, use.seen, use.gone)
        for use in uses
        if (use.seen, use.address) in unseen
        and not any(m.address <= use.address < m.address + m.bytes for m in maps)
    ]
    return maps, others


def _build(build: Callable) -> Callable:
    step = build()
    if not callable(step):
        raise ValueError(
            "build() has to return the step to call, a function without arguments; it returned"
            f" {_describe(step)}"
        )
    if isinstance(step, nn.Module):
        raise ValueError(
            "build() returned a model. It has to return the step to call: a function without"
            " arguments that runs forward, backward and optimizer.step()"
        )
    return step


def _number(result: object) -> float | None:
    """A step's loss as a number, when it returned one."""
    if isinstance(result, torch.Tensor) and result.numel() == 1:
        return float(result.detach())
    if isinstance(result, Real) and not isinstance(result, bool):
        return float(result)
    return None


def _time(build: Callable, repeats: int, device: torch.device) -> Seconds:
    """Time steps of a fresh run with nothing switched on."""
    step = _build(build)
    times: list[float] = []
    warm = False
    while len(times) < repeats:
        _synchronize(device)
        began = time.perf_counter()
        step()
        _synchronize(device)
        seconds = time.perf_counter() - began
        # The first step makes the optimizer's state and warms caches, which takes seconds at most.
        if warm or seconds >= _LONG_STEP:
            times.append(seconds)
        warm = True
    del step
    gc.collect()
    return Seconds(statistics.median(times), max(times) - min(times), repeats)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe(thing: object) -> str:
    return "nothing (None)" if thing is None else f"{type(thing).__name__} {thing!r:.60}"


def environment(device: str | torch.device | None = None) -> dict[str, object]:
    """What a number depends on: device, GPU, its memory in bytes, torch, driver,
    Python, threads.
    """
    device = resolve_device(device)
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "gpu_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "torch": torch.__version__,
        "driver": _driver() if cuda else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _driver() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(
            asked, capture_output=True, text=True, timeout=20, check=True
        ).stdout.split("\n")
        return answer[0].strip() or None
    return None
