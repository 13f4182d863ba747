"""`plan(model)`: the first switches of the course with which a training fits a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from memlab.meters.gpus import GPU, find_gpu
from memlab.predict import predict
from memlab.prediction import Fit, Prediction
from memlab.units import parse_bytes
from memlab.workloads.quiet import quiet_libraries

from .given import subject_of
from .result import Plan, Rung
from .subject import ModelSubject, RunSubject
from .switches import FREE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def plan(
    model: str | Path | PreTrainedConfig | Callable,
    *,
    batch: int = 1,
    sequence: int | None = None,
    gpu: str | GPU,
    lora: int | None = None,
    in_use: int | str = 0,
    every: bool = False,
    progress: bool = True,
    **options: object,
) -> Plan:
    """Find the switches of the course with which a training fits a GPU, without the GPU.

    One switch after the other is added to an ordinary training loop, in the order of
    `memlab.plan.switches`, and each loop is predicted. The first that fits is the answer; of it,
    each switch that costs time is left out again if the loop fits without it. Loops whose weights,
    gradients and optimizer state alone do not fit are not predicted: a formula is enough.

    Example:
        print(plan("Llama-3.1 8B", sequence=2048, gpu="RTX 4090"))

    Args:
        model: the name of a built-in model ("Llama-3.1 8B", "GPT-2 124M", "ViT-L"), the path of a
            `config.json`, a configuration of transformers; or a run with options that are named
            like the switches and False by default.
        batch: rows in a step.
        sequence: tokens in a row; None for images.
        gpu: the GPU's name, as people write it, or a size ("24 GiB").
        lora: the rank of LoRA's adapters; None trains the whole model.
        in_use: what others hold on the GPU ("1 GiB").
        every: whether each rung is predicted, also those that a formula excludes.
        progress: whether a bar shows how far each prediction is.
        **options: a run's other options.

    Returns:
        The `Plan`; where nothing fits, with the switches that need the least.

    Raises:
        ValueError: something given cannot be planned; the message says what and what to do.
        ImportError: transformers, or for LoRA PEFT, is not installed.
    """
    card = gpu if isinstance(gpu, GPU) else find_gpu(gpu)
    others = parse_bytes(in_use) if in_use else 0
    subject = subject_of(model, batch, sequence, lora, options)
    search = _Search(subject, card, others, progress)
    search.climb(every)
    search.leave_out()
    search.enlarge_micro_batches(batch)
    return search.plan()


class _Search:
    """The loops that were predicted so far, and the best of them."""

    def __init__(self, subject: ModelSubject | RunSubject, gpu: GPU, in_use: int, progress: bool):
        self.subject = subject
        self.gpu = gpu
        self.in_use = in_use
        self.progress = progress
        #: The switches that are on, and how many rows go through at once.
        self.on: tuple[str, ...] = ()
        self.micro_batch = 1
        self.rungs: list[Rung] = []
        self._known: dict[str, Prediction] = {}

    def predict(self, on: Collection[str], micro_batch: int = 1) -> Prediction:
        key = self.subject.code(on, micro_batch)
        if key not in self._known:
            # What transformers says of a script of ours is no news; of a person's own run it is.
            ours = isinstance(self.subject, ModelSubject)
            try:
                with quiet_libraries() if ours else contextlib.nullcontext():
                    run, options = self.subject.run(on, micro_batch)
                    self._known[key] = predict(run, gpu=self.gpu, progress=self.progress, **options)
            except Exception as error:
                error.add_note(f"plan() tried: {', '.join(on) or 'no switch'}.")
                raise
        return self._known[key]

    def fit(self, on: Collection[str], micro_batch: int = 1) -> Fit:
        return self.predict(on, micro_batch).fits(in_use=self.in_use)

    def hopeless(self, on: Collection[str]) -> int | None:
        """What the loop needs at least, if that is too much."""
        least = self.subject.least_bytes(on) + self.gpu.context_bytes
        return least if least > self.gpu.memory_bytes - self.in_use else None

    def climb(self, every: bool) -> None:
        """Add one switch after the other until it fits."""
        before = None
        predicted = []
        for on in self._combinations():
            last = len(on) == len(self.subject.switches)
            least = None if every or last or not on else self.hopeless(on)
            needed = least if least is not None else self.fit(on).needed_bytes
            took = None if before is None or least is not None else before - needed
            self.rungs.append(Rung(on[-1] if on else None, needed, least is None, took))
            before = needed if least is None else None
            if least is None:
                predicted.append(on)
            if least is None and self.fit(on):
                self.on = on
                return
        self.on = min(predicted, key=lambda on: self.fit(on).needed_bytes)

    def _combinations(self) -> Iterator[tuple[str, ...]]:
        for count in range(len(self.subject.switches) + 1):
            yield self.subject.switches[:count]

    def leave_out(self) -> None:
        """Switch off again what costs time and is not needed, the dearest first."""
        if not self.fit(self.on):
            return
        for switch in reversed(self.subject.in_force(self.on[:-1])):
            without = tuple(name for name in self.on if name != switch)
            if switch not in FREE and self.hopeless(without) is None and self.fit(without):
                self.on = without

    def enlarge_micro_batches(self, batch: int) -> None:
        """As few micro-batches as fit: small ones keep a GPU waiting."""
        if "micro-batches" not in self.on or isinstance(self.subject, RunSubject):
            return
        while 2 * self.micro_batch < batch and self.fit(self.on, 2 * self.micro_batch):
            self.micro_batch *= 2

    def plan(self) -> Plan:
        after = self.predict(self.on, self.micro_batch)
        notes = [*self.subject.notes, *after.notes]
        if "micro-batches" in self.on and isinstance(self.subject, ModelSubject):
            notes.append(f"micro-batches of {self.micro_batch}")
        fit = self.fit(self.on, self.micro_batch)
        if not fit:
            notes.append(
                "nothing is left to switch on. What would help: a smaller batch or a shorter"
                " sequence, LoRA, several GPUs"
            )
        switches = self.subject.in_force(self.on)
        rungs = tuple(
            dataclasses.replace(rung, off=self._why_off(rung.switch, switches))
            for rung in self.rungs
        )
        code = self.subject.code(self.on, self.micro_batch)
        before = self.predict(())
        return Plan(self.subject.title, fit, switches, rungs, before, after, code, tuple(notes))

    def _why_off(self, switch: str | None, switches: Collection[str]) -> str:
        if switch is None or switch in switches:
            return ""
        if switch in self.on:
            return "replaced by a later one"
        return "left out: it fits without" if self.fit(self.on) else "left out: it needs more"
