"""`watch(model, optimizer)`: a stretch of existing training code, in mid-life."""

from __future__ import annotations

import torch
from torch import nn

from memlab.measurement import Measurement, measurement_of
from memlab.meters.device import resolve_device
from memlab.meters.recording import Recording
from memlab.run import describe


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

    Args:
        things: any number of models and optimizers. They name what is alive at the start; models
            and optimizers that are first used inside are found without being named.
        device: `"cpu"` or `"cuda"`; by default that of the first model's parameters.
        lines: whether each block gets the line of your code that made it (`Block.line`). Costs some
            microseconds a call of PyTorch; the bytes are the same.

    Raises:
        ValueError: something given is neither a model nor an optimizer.
        RuntimeError: another measurement, or PyTorch's profiler, is running.
    """

    def __init__(
        self,
        *things: nn.Module | torch.optim.Optimizer,
        device: str | torch.device | None = None,
        lines: bool = False,
    ):
        for thing in things:
            if not isinstance(thing, (nn.Module, torch.optim.Optimizer)):
                raise ValueError(f"watch() takes models and optimizers, not {describe(thing)}")
        if device is None:
            parameters = (
                p for thing in things if isinstance(thing, nn.Module) for p in thing.parameters()
            )
            first = next(parameters, None)
            device = None if first is None or first.is_meta else first.device
        self._things = things
        self._lines = lines
        self._device = resolve_device(device)
        self._measurement: Measurement | None = None
        self._refusal: Exception | None = None

    def __enter__(self) -> watch:
        self._recording = Recording(self._device, counts_alive=True, lines=self._lines)
        self._recording.__enter__()
        try:
            observer = self._recording.observer
            observer.seen.look_around(before=True)
            for thing in self._things:
                if isinstance(thing, nn.Module):
                    for name, module in thing.named_modules():
                        observer.seen.see_module(module, name)
                else:
                    observer.seen.see_optimizer(thing)
            observer.seen.see_gradients()
        except BaseException:
            self._recording.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._measurement = self._refusal = None
        try:
            self._recording.observer.seen.look_around(after=True)
            self._recording.__exit__()
            self._measurement = measurement_of(self._recording.recorded)
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
