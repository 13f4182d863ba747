"""`watch(model, optimizer)`: a stretch of existing training code, in mid-life."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from memlab.growth import host_growth
from memlab.holders import find_holders
from memlab.ledger import Shapes, Span, numbers_in
from memlab.leftovers import Leftovers
from memlab.measurement import Measurement
from memlab.meters.device import resolve_device
from memlab.meters.live import objects_set_aside, references, tensors_in
from memlab.meters.recording import Recording
from memlab.meters.steps import StepCounter
from memlab.meters.unseen import Unseen
from memlab.run import describe
from memlab.stretches import Stretches, oldest_of

#: So many calls of modules are recorded in one go: what is recorded takes the host's memory, up to
#: 200 KB for each of them.
CALLS_AT_ONCE = 100

#: After so many, what is recorded of an evaluation is read, and a new stretch begins: it may go on
#: for as long as it likes.
CALLS_OF_AN_EVALUATION = 1_000

#: From then on two steps of so many are recorded in full.
EVERY = 100


class watch:  # noqa: N801 - read as a verb: `with watch(model, optimizer) as w:`
    """Measure a stretch of existing training code, in mid-life.

    Example:
        with watch(model, optimizer) as w:
            for tokens, targets in batches:
                ...
        print(w.measurement)

    What was alive at the start is counted and its end is seen. Afterwards `w.measurement` holds the
    `Measurement` (also when the code inside raised). Begin between two iterations: of a graph that
    is alive at the start, only what Python holds is known. On the CPU the thread that enters is
    measured, as by `measure`.

    It may go on for as long as a training does. The first steps are recorded in full (two or more,
    until modules were called 100 times), then two of every hundred and at each doubling (from steps
    32, 64, 128 on), and each step with a larger batch than all before. Of the others it knows the
    batch's shape and the host's heap after it. A step ends when its optimizer has stepped and a
    module is called again; or call `w.step()`.

    Args:
        things: any number of models and optimizers. They name what is alive at the start; models
            and optimizers that are first used inside are found without being named. None of them is
            kept alive.
        device: `"cpu"` or `"cuda"`; by default that of the first model's parameters.
        every: of so many steps two are recorded in full. 1 records all of them.
        lines: whether each block gets the line of your code that made it (`Block.line`). Costs some
            microseconds a call of PyTorch; the bytes are the same.

    Raises:
        ValueError: something given is neither a model nor an optimizer, or `every` is no number.
        RuntimeError: another measurement, or PyTorch's profiler, is running.
    """

    def __init__(
        self,
        *things: nn.Module | torch.optim.Optimizer,
        device: str | torch.device | None = None,
        every: int = EVERY,
        lines: bool = False,
    ):
        for thing in things:
            if not isinstance(thing, (nn.Module, torch.optim.Optimizer)):
                raise ValueError(f"watch() takes models and optimizers, not {describe(thing)}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every has to be a whole number of at least 1, not {every!r}")
        if device is None:
            parameters = (
                p for thing in things if isinstance(thing, nn.Module) for p in thing.parameters()
            )
            first = next(parameters, None)
            device = None if first is None or first.is_meta else first.device
        self._things = [weakref.ref(thing) for thing in things]
        self._lines = lines
        self._device = resolve_device(device)
        self._every = every
        self._measurement: Measurement | None = None
        self._refusal: Exception | None = None
        self._recording: Recording | None = None

    def __enter__(self) -> watch:
        self._measurement = self._refusal = None
        self._stretches = Stretches()
        self._counter = StepCounter(self._step_ended, self._called)
        self._largest = 0
        self._first_step = 1
        self._unseen = Unseen(self._device)
        self._leftovers = Leftovers(self._device)
        self._counter.__enter__()
        try:
            self._record()
        except BaseException:
            self._counter.__exit__()
            raise
        self._counter.begin()
        self._leftovers.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._leftovers.__exit__()
        self._counter.end_last_step()
        self._counter.__exit__()
        if self._recording is not None:
            self._stop(goes_on=False)
        if self._refusal is None:
            self._measurement = self._stretches.measurement(self._counter.counted)
            self._find_holders()
        del self._stretches, self._counter, self._leftovers

    def step(self) -> None:
        """Say that a step is over, where the optimizer does not tell it."""
        self._counter.end_step()

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

    # Stretches ------------------------------------------------------------------------------------

    def _record(self) -> None:
        """Begin to record in full."""
        if self._counter.number == 1:
            gc.collect()  # once, before anything is set aside: it takes as long as some steps
        with objects_set_aside():
            recording = Recording(self._device, counts_alive=True, lines=self._lines)
            recording.__enter__()
            try:
                seen = recording.observer.seen
                seen.look_around(before=True)
                for thing in filter(None, [reference() for reference in self._things]):
                    if isinstance(thing, nn.Module):
                        for name, module in thing.named_modules():
                            seen.see_module(module, name)
                    else:
                        seen.see_optimizer(thing)
                seen.see_gradients()
                self._unseen.note_in(recording)
            except BaseException:
                recording.__exit__()
                raise
        self._recording = recording
        self._first_step = self._counter.number

    def _record_again(self) -> None:
        """Begin to record in the midst of a training, which goes on whatever happens."""
        if self._refusal is None:
            try:
                self._record()
            except (RuntimeError, ValueError) as error:
                self._refusal = error

    def _stop(self, goes_on: bool = True) -> None:
        """End a stretch and read it."""
        recording, self._recording = self._recording, None
        counted = self._counter.counted[self._first_step - 1 :]
        try:
            for tensor in tensors_in(self._counter.coming):
                recording.observer.seen.see_input(tensor)
            recording.observer.seen.look_around(after=True)
            for step in counted:
                recording.observer.spans.append(Span(step.start, step.end, "step"))
            recording.builds_in_first_step = self._first_step == 1
            left = references(self._device)
            held = sum(s.nbytes() for reference in left.values() if (s := reference()) is not None)
            recording.__exit__()
            if self._first_step == 1 and counted:
                self._counter.leave_out_trials(recording.recorded.spans)
                counted = self._counter.counted[:]
                shapes = (shape for step in counted for shape in step.shapes)
                self._largest = max(map(numbers_in, shapes), default=0)
            measurement = self._stretches.add(recording.recorded, counted)
            measurement.left = left
            if goes_on:
                self._unseen.recorded(measurement.ledger, held)
        except (RuntimeError, ValueError) as error:
            self._refusal = error  # the training goes on: whoever asks for the measurement is told

    def _step_ended(self) -> None:
        ended = self._counter.number - 1
        if self._recording is not None and self._every > 1:
            steps = ended - self._first_step + 1
            is_first = self._first_step == 1
            calls = len(self._recording.observer.spans)
            if steps >= 2 and not (is_first and calls < CALLS_AT_ONCE):
                self._stop()
        if self._recording is None and self._is_due(ended + 1):
            self._record_again()

    def _is_due(self, number: int) -> bool:
        """Whether a step is to be recorded: of short loops, every one that doubles their length."""
        return number % self._every == 0 or number & (number - 1) == 0

    def _called(self, module: nn.Module, inputs: tuple, shapes: Shapes) -> None:
        """Begin a stretch at a batch that is larger than all before, or in a long evaluation."""
        size = max(map(numbers_in, shapes))
        begins = self._recording is None and size > self._largest
        self._largest = max(size, self._largest)
        if self._recording is not None and not torch.is_grad_enabled():
            begins = len(self._recording.observer.spans) > CALLS_OF_AN_EVALUATION
            if begins:
                self._stop()
        if begins:
            self._record_again()
        if begins and self._recording is not None:
            self._counter.begin()
            self._recording.observer.enter_module(module, inputs)

    def _find_holders(self) -> None:
        measurement = self._measurement
        if measurement is None:
            return
        verdict = measurement.verdict
        if verdict.kind == "creep" or host_growth(measurement.steps):
            oldest = oldest_of(measurement, verdict.column)
            # When the loop's function has returned, only they know who held it.
            found = find_holders(oldest, device=self._device) or self._leftovers.holders
            measurement.holders = tuple(found)
