"""Sees what each block of memory is for, with no help from the caller.

PyTorch lets anyone register hooks for *all* modules and *all* optimizers. Through them this file
sees parameters, buffers, inputs, gradients and optimizer state go by, and notes their addresses. It
allocates nothing, keeps nothing alive, and knows nothing of allocators: `memlab.ledger` joins what
it saw with what a meter counted.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from memlab.ledger import Observation, Span
from memlab.meters.live import live_objects, storages, tensors_in


@dataclass(slots=True, eq=False)
class Use:
    """A storage that the run used: from when it was first seen until it was gone (nanoseconds;
    None: not yet).
    """

    address: int
    bytes: int
    seen: int
    gone: int | None = None
    reference: weakref.ref | None = None


class Observer:
    """Watches modules and optimizers while it is switched on (`with observer:`).

    After that, `observations` and `spans` hold what was seen, for `memlab.ledger.build_ledger`.

    Args:
        device: the device whose tensors are noted.
        record: False for a budget, which may be in force for a long training. Then only `latest` is
            filled, with what was seen last at each address, and `place()` knows the module also
            while backward runs.
    """

    def __init__(self, device: torch.device, *, record: bool = True):
        self.device = device
        self._record = record
        self.latest: dict[tuple[int, str], Observation] = {}
        # Kept in four plain lists. A tuple for each would be an object that Python's garbage
        # collector counts: it would then run more often than without the meter, and free reference
        # cycles that the run itself keeps.
        self._seen_times: list[int] = []
        self._seen_addresses: list[int] = []
        self._seen_columns: list[str] = []
        self._seen_names: list[str] = []
        self.spans: list[Span] = []
        self.parameters: dict[int, weakref.ref] = {}
        self.uses: list[Use] = []
        self.before: set[int] = set()
        self.maps_before: set[int] = set()
        self.devices: set[torch.device] = set()
        self.threads: dict[int, str] = {}
        self.forward_with_grad = False
        #: Called once, when a model is about to run for the first time.
        self.on_first_call: Callable[[], None] | None = None
        self._failed_in = self._optimizer = self._backward_of = ""
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._local = threading.local()
        self._in_use: dict[int, Use] = {}
        self._inputs: set[int] = set()
        self._optimizer_started: dict[int, int] = {}
        self._handles: list = []

    def __enter__(self) -> Observer:
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            # `always_call`: a checkpoint's recomputation stops early by an exception, and the call
            # has to be closed. (Not `with_kwargs`: PyTorch 2.13 does not take that back when the
            # hook is removed.)
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for use in self.uses:
            use.reference = None  # has done its work

    @property
    def observations(self) -> list[Observation]:
        """What was seen so far."""
        seen = zip(
            self._seen_times,
            self._seen_addresses,
            self._seen_columns,
            self._seen_names,
            strict=True,
        )
        return [Observation(*one) for one in seen]

    # What is seen ---------------------------------------------------------------------------------

    def see(
        self, tensors: Iterable[torch.Tensor], column: str, name: str = "", *, outside: bool = True
    ) -> None:
        """Note that these tensors are of `column`, now. `outside=False`: the run may have nothing
        to do with them.
        """
        now = time.time_ns()
        for tensor in tensors:
            with contextlib.suppress(Exception):  # no memory of its own (lazy, functional, fake)
                for storage in storages(tensor):
                    if storage.device == self.device and storage.nbytes():
                        address = storage.data_ptr()
                        if not self._record:
                            self.latest[address, column] = Observation(now, address, column, name)
                            continue
                        self._seen_times.append(now)
                        self._seen_addresses.append(address)
                        self._seen_columns.append(column)
                        self._seen_names.append(name)
                        if outside and column in ("parameters", "batch"):
                            self._use(storage, address, now)

    def _use(self, storage: torch.UntypedStorage, address: int, now: int) -> None:
        use = self._in_use.get(address)
        if use is not None and use.gone is None and use.bytes == storage.nbytes():
            return
        self._in_use[address] = use = Use(address, storage.nbytes(), now)
        self.uses.append(use)

        def gone(reference: weakref.ref, use: Use = use) -> None:
            use.gone = time.time_ns()

        use.reference = weakref.ref(storage, gone)

    def see_module(self, module: nn.Module, prefix: str) -> None:
        """Note a module's own parameters and buffers (not its children's)."""
        for name, parameter in module.named_parameters(recurse=False):
            self._see_parameter(parameter, f"{prefix}.{name}" if prefix else name)
        for name, buffer in module.named_buffers(recurse=False):
            self.see((buffer,), "parameters", f"{prefix}.{name}" if prefix else name)

    def _see_parameter(self, parameter: torch.Tensor, name: str) -> None:
        if parameter.device.type == "meta":
            which = f"parameter {name!r}" if name else "a parameter of the optimizer"
            raise ValueError(
                f"{which} is on the meta device: it has a shape but no bytes, so there is nothing"
                f" to measure. Build the model on {self.device}, or call"
                f" .to_empty(device={str(self.device)!r}) first."
            )
        self.see((parameter,), "parameters", name)
        self.devices.add(parameter.device)
        known = self.parameters.get(id(parameter))
        if known is None or known() is None:  # the id of what is gone is given out again
            self.parameters[id(parameter)] = weakref.ref(parameter)

    def used_parameters(self) -> list[torch.Tensor]:
        """The parameters that a module or an optimizer used while the observer was on, as far as
        they still live.
        """
        return [
            parameter
            for reference in self.parameters.values()
            if (parameter := reference()) is not None
        ]

    def see_gradients(self) -> None:
        """Note the gradients of every parameter seen so far."""
        for parameter in self.used_parameters():
            if parameter.grad is not None:
                self.see((parameter.grad,), "gradients")

    def see_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Note an optimizer's parameters, their gradients and its state."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._see_parameter(parameter, "")
                if parameter.grad is not None:
                    self.see((parameter.grad,), "gradients")
        for state in list(optimizer.state.values()):
            self.see(tensors_in(state), "optimizer_state")

    def look_around(self, *, before: bool = False, after: bool = False) -> None:
        """Note what every live model, optimizer and data set holds, whether or not it was used
        while we watched.

        Args:
            before: the steps have not begun: any other tensor that Python holds is the batch
                (inputs, targets, a data set kept on the device) if it needs no gradient, and an
                activation if autograd made it.
            after: the steps are over: a tensor that was trained, and that no module was given, is a
                parameter.

        What was not there before the run counts as used by it.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # asking some tensors for their gradient warns
            for thing in live_objects(
                nn.Module, torch.optim.Optimizer, torch.utils.data.Dataset, torch.Tensor
            ):
                with contextlib.suppress(
                    Exception
                ):  # strangers, as above: half-built, lazy, fake, of any class
                    if isinstance(thing, nn.Module):
                        name = self._names.get(thing, type(thing).__name__)
                        own = [
                            *thing.named_parameters(recurse=False),
                            *thing.named_buffers(recurse=False),
                        ]
                        for part, tensor in own:
                            self.see((tensor,), "parameters", f"{name}.{part}", outside=False)
                            if tensor.is_leaf and tensor.grad is not None:
                                self.see((tensor.grad,), "gradients", outside=False)
                    elif isinstance(thing, torch.optim.Optimizer):
                        for group in thing.param_groups:
                            self.see(group["params"], "parameters", outside=False)
                        for state in list(thing.state.values()):
                            self.see(tensors_in(state), "optimizer_state", outside=False)
                    elif isinstance(thing, torch.utils.data.Dataset):
                        self.see(
                            tensors_in(vars(thing)), "batch", type(thing).__name__, outside=False
                        )
                    elif isinstance(thing, nn.Parameter):
                        # A parameter whose module is still being built is known by its class.
                        self.see((thing,), "parameters", outside=False)
                    elif before or after:
                        self._look_at(thing, after)
        self.see_gradients()

    def _look_at(self, tensor: torch.Tensor, after: bool) -> None:
        """Note a tensor that belongs to no model, optimizer or data set."""
        addresses = {storage.data_ptr() for storage in storages(tensor)}
        outside = not addresses & (self.before | self.maps_before)
        if tensor.grad_fn is not None:
            if not after:
                self.see((tensor,), "activations", outside=outside)
        elif not tensor.requires_grad:
            self.see((tensor,), "batch", outside=outside)
        elif after and not addresses & self._inputs:
            self.see((tensor,), "parameters", outside=outside)
        if tensor.is_leaf and tensor.grad is not None:
            self.see((tensor.grad,), "gradients", outside=outside)

    # Hooks ----------------------------------------------------------------------------------------

    @property
    def stack(self) -> list[tuple[str, int, int]]:
        """The modules that run forward in this thread now: (name, start, id), outermost first."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def _enter_module(self, module: nn.Module, inputs: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        if self.on_first_call is not None:
            self.on_first_call()
        if not self.stack and module not in self._names:
            for name, part in module.named_modules():
                self._names.setdefault(part, name or type(module).__name__)
        name = self._names.get(module, type(module).__name__)
        self._failed_in = self._optimizer = self._backward_of = ""
        self.threads.setdefault(threading.get_ident(), name)
        self.stack.append((name, time.time_ns(), id(module)))
        self.forward_with_grad |= torch.is_grad_enabled()
        self.see_module(module, name)
        for tensor in tensors_in(inputs):
            if tensor.grad_fn is None:
                self.see((tensor,), "batch", "input")
                with contextlib.suppress(Exception):
                    self._inputs.update(storage.data_ptr() for storage in storages(tensor))

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
            return
        self._optimizer, self._failed_in, self._backward_of = type(optimizer).__name__, "", ""
        self.threads.setdefault(threading.get_ident(), f"{self._optimizer}.step()")
        self.see_optimizer(optimizer)
        self._optimizer_started[id(optimizer)] = time.time_ns()

    def _leave_optimizer(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._optimizer = ""
        started = self._optimizer_started.pop(id(optimizer), None)
        if torch.compiler.is_compiling() or started is None:
            return
        if self._record:
            self.spans.append(Span(started, time.time_ns(), "optimizer", type(optimizer).__name__))
        self.see_optimizer(optimizer)
