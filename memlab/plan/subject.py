"""What is planned: a model that the plan's script trains, or somebody's run."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .script import Model, script_of
from .switches import SWITCHES

#: Of each number of a moment in 8 bits: a byte, and an FP32 scale for 256 of them.
_EIGHT_BITS = 1 + 4 / 256


@dataclass(frozen=True)
class ModelSubject:
    """A model that is trained by a script which the plan writes.

    Attributes:
        model: the model, as the script needs it.
        batch: rows in a step.
        sequence: tokens in a row; 0 for images.
        lora: the adapters' rank; None trains the whole model.
    """

    model: Model
    batch: int
    sequence: int
    lora: int | None

    @property
    def title(self) -> str:
        rows = f"batch {self.batch:,}"
        if not self.model.images:
            rows += f" of {self.sequence:,} tokens"
        kind = "full fine-tuning" if self.lora is None else f"LoRA of rank {self.lora}"
        return f"{self.model.name}, {rows}, {kind}"

    @property
    def switches(self) -> tuple[str, ...]:
        """Those that there are for it, in order."""
        without = set()
        if self.model.sixteen_bits:
            without |= {"BF16 autocast", "BF16 weights"}
        if self.model.images:
            without.add("fused loss")
        if self.batch == 1:
            without.add("micro-batches")
        return tuple(switch.name for switch in SWITCHES if switch.name not in without)

    @property
    def notes(self) -> tuple[str, ...]:
        if self.lora is not None:
            return ("the base is frozen; adapters on all linear layers, FP32 as PEFT makes them",)
        if self.model.sixteen_bits:
            return (
                "the weights are loaded in BF16, as published in 16 bits, and trained in BF16:"
                " AdamW's moments are BF16, too. FP32 master weights would be 8 bytes a parameter"
                " more",
            )
        return ("the weights are loaded in FP32, as published, and AdamW's moments are FP32",)

    def in_force(self, on: Collection[str]) -> tuple[str, ...]:
        """Those that no later one replaces."""
        replaced = set()
        if "BF16 weights" in on:
            replaced |= {"BF16 autocast", "fused AdamW"}
        if "8-bit AdamW" in on:
            replaced.add("fused AdamW")
        if "parameter offloading" in on:
            replaced.add("optimizer in backward")  # the gradients wait on the host, too
        elif {"micro-batches", "optimizer in backward"} <= set(on):
            replaced.add("checkpoints")  # each micro-batch of a block is one then
        return tuple(name for name in on if name not in replaced)

    def code(self, on: Collection[str], micro_batch: int) -> str:
        """The script with these switches on."""
        return script_of(self.model, on, self.batch, self.sequence, micro_batch, self.lora)

    def run(self, on: Collection[str], micro_batch: int) -> tuple[Callable, dict[str, object]]:
        """What is predicted: the script itself, executed."""
        code = self.code(on, micro_batch)
        name = f"<plan: {', '.join(on) or 'no switch'}>"
        # So that an error's traceback shows its lines.
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        module: dict[str, object] = {"__name__": "memlab_plan"}
        exec(compile(code, name, "exec"), module)
        return module["train"], {}

    def least_bytes(self, on: Collection[str]) -> int:
        """What cannot be less: weights, gradients and state, all there when the optimizer steps."""
        if "parameter offloading" in on:
            return 0  # how much of the model is in its blocks is not known here
        number = 2 if self.model.sixteen_bits or "BF16 weights" in on else 4
        if self.lora is not None:
            return number * self.model.parameters
        moments = 2 * (_EIGHT_BITS if "8-bit AdamW" in on else number)
        moments *= "optimizer state offloading" not in on
        gradients = number * ("optimizer in backward" not in on)
        # Small tensors keep FP32 moments, which is more and not less.
        return int((number + gradients + moments) * self.model.parameters)


@dataclass(frozen=True)
class RunSubject:
    """Somebody's run, whose options are named like the switches.

    Attributes:
        given: the run.
        options: what it is called with beside the switches.
    """

    given: Callable
    options: Mapping[str, object] = field(default_factory=dict)

    notes = ()

    @property
    def title(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{getattr(self.given, '__name__', 'run')}({options})"

    @cached_property
    def _names(self) -> dict[str, str]:
        parameters = inspect.signature(self.given).parameters
        return {
            switch.name: option
            for switch in SWITCHES
            for option in switch.options
            if option in parameters and parameters[option].default is False
        }

    @property
    def switches(self) -> tuple[str, ...]:
        """Those that it has an option for, in order."""
        return tuple(name for name in self._names if self._names[name] not in self.options)

    def in_force(self, on: Collection[str]) -> tuple[str, ...]:
        """All of them: what a run does with them is not known."""
        return tuple(on)

    def code(self, on: Collection[str], micro_batch: int) -> str:
        """The call with these switches on."""
        options = self.run(on, micro_batch)[1]
        said = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{getattr(self.given, '__name__', 'run')}({said})\n"

    def run(self, on: Collection[str], micro_batch: int) -> tuple[Callable, dict[str, object]]:
        """What is predicted."""
        return self.given, {**self.options, **{self._names[name]: True for name in on}}

    def least_bytes(self, on: Collection[str]) -> int:
        """Nothing is known of it."""
        return 0
