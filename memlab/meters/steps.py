"""Counts the steps of a loop, so cheaply that it can go on for as long as a training does."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from memlab.ledger import Counted, Shapes, Span
from memlab.meters.beside import keywords_of
from memlab.meters.heap import heap_in_use
from memlab.meters.live import tensors_in

# The shapes that one step's note has room for, the last ones: it may have a thousand micro-batches.
_MOST_SHAPES = 64


class StepCounter:
    """Notes for each step its time, the shapes that the outermost module received, and the heap
    after it.

    The first step begins when a module is called: what came before may have built it. A step is
    over when its optimizer has stepped and a module is called again: so what the loop does after
    the optimizer belongs to it. With several optimizers it is the first one that counts, as long as
    it steps; one that is made anew for its parameters takes its place.
    Where no optimizer shows itself, as a compiled one does not, it has stepped when the model's
    first parameter was written.
    A loop that knows better calls `end_step`, and from then on only that counts.

    Args:
        ended: called after each step, before the next one begins.
        called: called with the shapes of each call of the outermost module, before it runs.
        by_hand: whether only `end_step` ends a step, from the first one on.
    """

    def __init__(
        self,
        ended: Callable[[], None] = lambda: None,
        called: Callable[[nn.Module, tuple, Shapes], None] = lambda module, inputs, shapes: None,
        *,
        by_hand: bool = False,
    ):
        self.counted: list[Counted] = []
        #: While a step ends: what the module was given that is about to run, in the next one.
        self.coming: tuple = ()
        self._on_end = ended
        self._on_call = called
        self._optimizer: weakref.ref | None = None
        self._others: set[int] = set()
        self._trained: weakref.ref | None = None  # a parameter, where no optimizer shows itself
        self._version = 0
        self._stepped = False
        self._by_hand = by_hand
        self._root: int | None = None
        self._has_shapes = False
        #: Of the step that runs: when its calls were, and with what.
        self._shapes: deque[tuple[int, tuple[int, ...]]] = deque(maxlen=_MOST_SHAPES)
        self._first_shapes: tuple[tuple[int, tuple[int, ...]], ...] = ()
        self._handles: list = []

    def __enter__(self) -> StepCounter:
        self._start = time.time_ns()
        self._handles = [
            register_module_forward_pre_hook(self._called),
            register_optimizer_step_post_hook(self._optimizer_stepped),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def number(self) -> int:
        """The number of the step that runs now."""
        return len(self.counted) + 1

    def begin(self) -> None:
        """Have the step that runs begin now: what came before built it."""
        self._start = time.time_ns()

    def leave_out_trials(self, spans: Sequence[Span]) -> None:
        """Take from the first step, which is over, the calls that only tried the model out.

        Args:
            spans: what ran, the steps among it, as `memlab.ledger.building` cut them.
        """
        began = min(span.start for span in spans if span.kind == "step")
        trials = [span.end for span in spans if span.kind == "module" and span.start < began]
        if trials:
            ended = max(trials)
            shapes = tuple(shape for time, shape in self._first_shapes if time >= ended)
            self.counted[0] = self.counted[0]._replace(start=began, shapes=shapes)

    def end_step(self) -> None:
        """Note that a step is over."""
        self._by_hand = True
        self._end()

    def end_last_step(self) -> None:
        """Note the last step, after which no module was called."""
        self._stepped |= self._is_written()
        if self._stepped and not self._by_hand:
            self._end()

    def _end(self) -> None:
        now = time.time_ns()
        shapes = tuple(shape for _, shape in self._shapes)
        if not self.counted:
            self._first_shapes = tuple(self._shapes)
        self.counted.append(Counted(self.number, self._start, now, shapes, heap_in_use()))
        self._stepped, self._root, self._has_shapes = False, None, False
        self._trained = None
        self._shapes.clear()
        self._on_end()
        # What was done with the step that is over does not count for the next one.
        self._start = time.time_ns()

    def _optimizer_stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        first = self._optimizer() if self._optimizer is not None else None
        # Another one that steps again, and the first one has not meanwhile, has taken its place; so
        # has one that steps the same parameters.
        made_anew = first is not None and not self._stepped and _share(first, optimizer)
        if first is None or id(optimizer) in self._others or made_anew:
            self._optimizer = weakref.ref(optimizer)
        elif first is not optimizer:
            self._others.add(id(optimizer))
            return
        self._others.clear()
        self._stepped = True

    def _is_written(self) -> bool:
        """Whether the parameter was written since its model was called: a compiled optimizer runs
        no hook.
        """
        parameter = self._trained() if self._trained is not None else None
        if self._optimizer is not None or parameter is None:
            return False
        return parameter._version != self._version

    def _note_trained(self, module: nn.Module) -> None:
        parameter = next((p for p in module.parameters() if p.requires_grad), None)
        self._trained = None if parameter is None else weakref.ref(parameter)
        self._version = 0 if parameter is None else parameter._version

    def _called(self, module: nn.Module, inputs: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        is_outermost = self._root in (None, id(module))
        if is_outermost:
            self._stepped |= self._is_written()
        if self._stepped and not self._by_hand:
            self.coming = (inputs, keywords_of(module))
            self._end()
            self.coming = ()
        if is_outermost and self._optimizer is None:
            self._note_trained(module)
        if self._root is None:
            self._root = id(module)
            if not self.counted:
                self.begin()
        elif self._has_shapes and id(module) != self._root:
            return
        # A model that is called with keywords shows its shapes when its first part is called.
        shapes = tuple(tuple(tensor.shape) for tensor in tensors_in(inputs))[::-1]
        if shapes:
            self._has_shapes = True
            now = time.time_ns()
            self._shapes.extend((now, shape) for shape in shapes)
            self._on_call(module, inputs, shapes)


def _share(first: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    """Whether two optimizers have a parameter in common."""
    ids = [{id(p) for group in o.param_groups for p in group["params"]} for o in (first, other)]
    return not ids[0].isdisjoint(ids[1])
