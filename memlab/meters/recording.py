"""Records a stretch of a run: the meter and the observer, switched on together and off together.

What they saw is one value, `Recorded`. Whether it can be measured (`memlab.meters.refusals`) and
what it says (`memlab.measurement`) are functions of that value alone.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import torch

from memlab.ledger import Block, Observation, Span, Spans
from memlab.ledger.building import without_building
from memlab.meters.compiled import add_compiled_steps, moments_read
from memlab.meters.device import meter_for
from memlab.meters.gradients import Missing
from memlab.meters.live import live_storages
from memlab.meters.observer import Observer
from memlab.meters.readings import Readings
from memlab.meters.recorded import Recorded

_measuring = False


class Recording:
    """Records from the start of its `with` block to its end; then `recorded` is there.

    Args:
        device: the device to measure.
        counts_alive: whether what is alive at the start is part of it.
        collect: whether garbage is collected before the start.
        lines: whether the lines of the user's code are noted (`memlab.meters.lines`).
        meter: the device's meter (None: the one that measures it).

    Raises:
        RuntimeError: another recording, or PyTorch's profiler, is running.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        counts_alive: bool = False,
        collect: bool = False,
        lines: bool = False,
        meter: object | None = None,
    ):
        self.device = device
        self.observer = Observer(device, lines=lines)
        self.recorded: Recorded | None = None
        self._counts_alive = counts_alive
        self._collect = collect
        self._meter = meter or meter_for(device)
        self._alive: list[Block] = []
        self._references: list[weakref.ref] = []
        self._steps_begun: int | None = None
        #: Whether calls that only try the model out are cut off the first step.
        self.builds_in_first_step = False
        self._nothing_to_train = False

    def __enter__(self) -> Recording:
        global _measuring
        if _measuring:
            raise RuntimeError(
                "a measurement is running already, and there can be one at a time. Measure one run"
                " after the other."
            )
        _measuring = True
        try:
            if self._collect:
                gc.collect()  # else what was alive before is not counted, and may go when it likes
            self._note_alive()
            self._meter.start()
            self._start = time.time_ns()
            self._thread = threading.get_ident()
            self.observer.__enter__()
        except BaseException:
            _measuring = False
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        global _measuring
        try:
            self.observer.__exit__()
            end = time.time_ns()
            with no_garbage_collection():
                readings = self._meter.stop()
                self.recorded = self._gather(readings, end)
        finally:
            _measuring = False
            # The references to storages from before have done their work.
            self._references.clear()

    def note_unseen(self, size: int, column: str, name: str) -> None:
        """Count bytes from before that no tensor of Python holds, such as a graph's.

        Args:
            size: how many.
            column: what they are.
            name: the same in words.
        """
        address = -1 - len(self._alive)
        self._alive.append(Block(size, address, self._start - 1, column=column, name=name))

    def _note_alive(self) -> None:
        """Note the storages from before; where they are counted, see each one's end."""
        before = time.time_ns()
        self.observer.seen.maps_before.update(live_storages(self.device, maps=True))
        for address, storage in live_storages(self.device).items():
            self.observer.seen.before.add(address)
            if not self._counts_alive:
                continue
            block = Block(storage.nbytes(), address, before)

            def gone(reference: weakref.ref, block: Block = block) -> None:
                block.died = time.time_ns()

            self._alive.append(block)
            self._references.append(weakref.ref(storage, gone))

    def _gather(self, readings: Readings, end: int) -> Recorded:
        alive = self._alive
        if self._counts_alive and readings.alive is not None:  # a GPU's
            # The allocator's own map says it better: it knows also what Python does not hold.
            alive = [Block(b.bytes, b.address, self._start - 1) for b in readings.alive]
        observer = self.observer
        return Recorded(
            device=self.device,
            readings=readings,
            start=self._start,
            end=end,
            thread=self._thread,
            counts_alive=self._counts_alive,
            observations=[*observer.seen.observations, *readings.observations],
            spans=self._spans(readings),
            alive=alive,
            uses=observer.seen.uses,
            before=frozenset(observer.seen.before),
            devices=frozenset(observer.seen.devices),
            threads=dict(observer.threads),
            nothing_to_train=self._nothing_to_train,
            replaced=observer.seen.replaced,
            missing=observer.seen.missing,
            evaluating=observer.seen.evaluating,
        )

    def _spans(self, readings: Readings) -> list[Span]:
        spans = [*readings.spans, *self.observer.spans]
        spans = add_compiled_steps(spans, moments_read(self._start))
        if not self.builds_in_first_step:
            return spans
        steps = Spans(span for span in spans if span.kind == "step")
        others = [span for span in spans if span.kind != "step"]
        return [*others, *without_building(Spans(others), steps)]

    # The steps of a run ---------------------------------------------------------------------------

    def begin_steps_at_first_call(self) -> None:
        """Have the steps begin when a model is first called: for a run that builds as it goes. A
        call that only tries the model out is told apart at the end.
        """
        self.builds_in_first_step = True
        self.observer.on_first_call = self.begin_steps

    def begin_steps(self) -> None:
        """Note that the run is built: what is alive now is what its steps work with."""
        self.observer.on_first_call = None
        self.observer.seen.look_around(before=True)
        self._steps_begun = time.time_ns()

    def run_step(self, step: Callable[[], object]) -> object:
        """Run one step, and see the gradients it leaves behind."""
        began = time.time_ns()
        result = step()
        if callable(result) and not isinstance(result, torch.Tensor):
            raise ValueError(
                "the step returned a function. Did build() return another build function, not yet"
                " called? Return what it returns: `return build_other()`."
            )
        if self._steps_begun is not None:
            began = max(began, self._steps_begun)
        self.observer.seen.see_gradients()
        self.observer.stack.clear()  # of calls that something other than an Exception ended
        self.observer.spans.append(Span(began, time.time_ns(), "step"))
        self._note_gradients(result)
        return result

    def _note_gradients(self, result: object) -> None:
        """Note a step that looks as if it was meant to train, and had nothing to train."""
        if not isinstance(result, torch.Tensor) or result.requires_grad:
            return
        if not self.observer.forward_with_grad:
            return
        parameters = self.observer.seen.used_parameters()
        # A loss may come back detached: that is fine as long as something needed a gradient.
        if parameters and not any(p.requires_grad or p.grad is not None for p in parameters):
            self._nothing_to_train = True


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector away while a record is read.

    It becomes a few hundred thousand objects, and the collector would walk through all of them,
    often.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
