"""Sees what each block of memory is for, with no help from the caller.

PyTorch lets anyone register hooks for *all* modules and *all* optimizers. Through them this file
sees parameters, buffers, inputs, gradients and optimizer state go by, and shows them to
`memlab.meters.sightings`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from memlab.ledger import FROM_LOADER, Span
from memlab.meters.beside import keywords_of, targets_beside
from memlab.meters.compiled import note_read
from memlab.meters.lines import Lines
from memlab.meters.live import tensors_in
from memlab.meters.loaders import batches_shown
from memlab.meters.reducers import Reducers
from memlab.meters.sightings import Sightings


class Observer:
    """Watches modules and optimizers while it is switched on (`with observer:`).

    After that, `seen` and `spans` hold what was seen, for `memlab.ledger.build_ledger`.

    Args:
        device: the device whose tensors are noted.
        record: False for a budget, which may be in force for a long training. Then only
            `seen.latest` is filled, and `place()` knows the module also while backward runs.
        lines: whether the lines of the user's code are noted too (`memlab.meters.lines`).
    """

    def __init__(self, device: torch.device, *, record: bool = True, lines: bool = False):
        self.device = device
        self._record = record
        self.seen = Sightings(device, record=record)
        self.spans: list[Span] = []
        self.threads: dict[int, str] = {}
        self.forward_with_grad = False
        #: Called once, when a model is about to run for the first time.
        self.on_first_call: Callable[[], None] | None = None
        #: When an outermost module was called first, and last (nanoseconds).
        self.first_call = self.last_call = 0
        self._failed_in = self._optimizer = self._backward_of = ""
        self._local = threading.local()
        self._optimizer_started: dict[int, int] = {}
        self._handles: list = []
        self._lines = Lines() if lines else contextlib.nullcontext()
        self._reducers = Reducers(self.spans.append)
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Observer:
        self._handles = [
            register_module_forward_pre_hook(self.enter_module),
            # `always_call`: a checkpoint's recomputation stops early by an exception, and the call
            # has to be closed. (Not `with_kwargs`: PyTorch 2.13 does not take that back when the
            # hook is removed.)
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ]
        self._lines.__enter__()
        self._patches.enter_context(batches_shown(self._see_batch))
        self._patches.enter_context(self._reducers.seen())
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.close()
        self._lines.__exit__(*exception)
        self.spans += getattr(self._lines, "spans", ())
        if self._record and self._optimizer and self._optimizer_started:
            # An exception ended the run in the middle of this step.
            started = max(self._optimizer_started.values())
            self.spans.append(Span(started, time.time_ns(), "optimizer", self._optimizer))
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.seen.end()

    # Hooks ----------------------------------------------------------------------------------------

    @property
    def stack(self) -> list[tuple[str, int, int]]:
        """The modules that run forward in this thread now: (name, start, id), outermost first."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def enter_module(self, module: nn.Module, inputs: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        if self.on_first_call is not None:
            self.on_first_call()
            # The targets of later steps have the end of the run to be told from what is kept.
            given = list(tensors_in((inputs, keywords_of(module))))
            self.seen.see(targets_beside(given), "batch", "target", outside=False)
        if not self.stack and module not in self.seen.models.called:
            self.seen.models.note_called(module)
        name = self.seen.names.get(module, type(module).__name__)
        runs_again = bool(self._backward_of)  # in a backward, as checkpointing does it
        self._failed_in = self._optimizer = self._backward_of = ""
        self.threads.setdefault(threading.get_ident(), name)
        now = time.time_ns()
        if not self.stack and not runs_again:
            self.last_call = now
            self.first_call = self.first_call or now
        if self._record:
            self._reducers.entered(module, now)
        self.stack.append((name, now, id(module)))
        self.forward_with_grad |= torch.is_grad_enabled()
        self.seen.see_module(module, name)
        for tensor in tensors_in(inputs):
            if tensor.grad_fn is None:
                self.seen.see_input(tensor)
            else:
                self.seen.see_types((tensor,))

    def _see_batch(self, batch: object) -> None:
        tensors = [tensor for tensor in tensors_in(batch) if tensor.grad_fn is None]
        self.seen.see(tensors, "batch", FROM_LOADER)

    def _leave_module(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if torch.compiler.is_compiling() or id(module) not in (entry[2] for entry in self.stack):
            return
        while True:
            # A call that ended by something other than an Exception was never closed. It lies above
            # this one.
            name, start, identity = self.stack.pop()
            if identity == id(module):
                break
        if self._record:
            graph = 0 if torch.is_grad_enabled() else -1
            self.spans.append(
                Span(start, time.time_ns(), "module", name, threading.get_ident(), graph)
            )
            self.seen.see_types(tensors_in(output))
        elif output is not None:
            self._follow(output, name)
        elif not self._failed_in:
            # most likely an exception is on its way up; the innermost module is left first
            self._failed_in = name

    def _follow(self, output: object, name: str) -> None:
        """Have autograd say when backward reaches the node that made a module's output."""

        def reached(gradients: tuple) -> None:
            self._backward_of = name

        for tensor in tensors_in(output):
            # The innermost module is left first, and an outer one with the same output adds
            # nothing.
            if tensor.grad_fn is not None and "memlab" not in tensor.grad_fn.metadata:
                tensor.grad_fn.metadata["memlab"] = name
                tensor.grad_fn.register_prehook(reached)

    def place(self, *, failed: bool = False) -> str:
        """Where the run is now, for people. With `failed`: where it was when an
        exception ended it.
        """
        if self.stack:
            return f"in {self.stack[-1][0]}"
        if self._optimizer:
            return f"in {self._optimizer}.step()"
        if failed and self._failed_in:
            return f"in {self._failed_in}"
        if self._backward_of and (
            failed or not torch.is_grad_enabled()
        ):  # backward runs without gradients
            return f"in the backward of {self._backward_of}"
        return "outside any module"

    def _enter_optimizer(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            note_read()
            return
        self._optimizer, self._failed_in, self._backward_of = type(optimizer).__name__, "", ""
        self.threads.setdefault(threading.get_ident(), f"{self._optimizer}.step()")
        self.seen.see_optimizer(optimizer)
        self._optimizer_started[id(optimizer)] = time.time_ns()

    def _leave_optimizer(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._optimizer = ""
        started = self._optimizer_started.pop(id(optimizer), None)
        if torch.compiler.is_compiling() or started is None:
            return
        if self._record:
            self.spans.append(Span(started, time.time_ns(), "optimizer", type(optimizer).__name__))
        self.seen.see_optimizer(optimizer)
