"""Sees what each block of memory is for, with no help from the caller.

PyTorch lets anyone register hooks for *all* modules and *all* optimizers. Through them this file sees parameters,
buffers, inputs, gradients and optimizer state go by, and notes their addresses. It allocates nothing, keeps nothing
alive, and knows nothing of allocators: `memlab.ledger` joins what it saw with what a meter counted.
"""

from __future__ import annotations

import gc
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from memlab.ledger import Observation, Span


def storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages that a tensor's bytes really live in: a view's base, the parts of a tensor subclass, sparse parts."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        # A wrapper subclass (torchao's 8-bit state, DTensor) says by this protocol which tensors it is made of.
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        if tensor.device.type != "meta":
            yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        for part in (tensor.detach()._indices(), tensor.detach()._values()):
            yield from storages(part)
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            yield from storages(part)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dictionaries (and objects with a `.items()`, such as model outputs)."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def live_objects(*kinds: type) -> list:
    """Every live object of some classes that Python's garbage collector knows."""
    # The class is asked, not the object: asking some lazily imported objects would import whole packages.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]


def live_storages(device: torch.device) -> dict[int, torch.UntypedStorage]:
    """Every storage on a device that a live Python tensor (or its gradient) holds, by address. Memory maps excluded."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking some tensors for their gradient warns
        for tensor in live_objects(torch.Tensor):
            try:
                if tensor.device != device:
                    continue
                parts = list(storages(tensor))
                if tensor.is_leaf and tensor.grad is not None:
                    parts += storages(tensor.grad)
            except (RuntimeError, NotImplementedError):
                continue  # a tensor with no memory of its own: functional, fake, not yet materialised
            for storage in parts:
                if storage.nbytes() and storage.filename is None:
                    found[storage.data_ptr()] = storage
    return found


class Observer:
    """Watches modules and optimizers while it is switched on (`with observer:`).

    After that, `observations` and `spans` hold what was seen, for `memlab.ledger.build_ledger`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.observations: list[Observation] = []
        self.spans: list[Span] = []
        self.parameters: dict[int, weakref.ref] = {}
        self.used: dict[int, int] = {}
        self.devices: set[torch.device] = set()
        self.forward_with_grad = False
        self.failed_in = ""
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._local = threading.local()
        self._optimizer_started: dict[int, int] = {}
        self._handles: list = []

    def __enter__(self) -> Observer:
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            # `always_call`: a checkpoint's recomputation stops early by an exception, and the call has to be closed.
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # What is seen ----------------------------------------------------------------------------------------------------

    def see(
        self, tensors: Iterable[torch.Tensor], column: str, name: str = "", *, outside: bool = True
    ) -> None:
        """Note that these tensors are of `column`, now. `outside=False`: the run may have nothing to do with them."""
        now = time.time_ns()
        for tensor in tensors:
            try:
                for storage in storages(tensor):
                    if storage.device == self.device and storage.nbytes():
                        address = storage.data_ptr()
                        self.observations.append(Observation(now, address, column, name))
                        if outside:
                            self.used[address] = storage.nbytes()
            except (RuntimeError, NotImplementedError):
                continue  # no memory of its own (functional, fake): nothing to account for

    def see_module(self, module: nn.Module, prefix: str) -> None:
        """Note a module's own parameters and buffers (not its children's)."""
        for name, parameter in module.named_parameters(recurse=False):
            self._see_parameter(parameter, f"{prefix}.{name}" if prefix else name)
        for name, buffer in module.named_buffers(recurse=False):
            self.see((buffer,), "parameters", f"{prefix}.{name}" if prefix else name)

    def _see_parameter(self, parameter: torch.Tensor, name: str) -> None:
        if parameter.device.type == "meta":
            raise ValueError(
                f"parameter {name!r} is on the meta device: it has a shape but no bytes, so there is nothing to "
                f"measure. Build the model on {self.device}, or call .to_empty(device={str(self.device)!r}) first."
            )
        self.see((parameter,), "parameters", name)
        self.devices.add(parameter.device)
        if id(parameter) not in self.parameters:
            self.parameters[id(parameter)] = weakref.ref(parameter)

    def used_parameters(self) -> list[torch.Tensor]:
        """The parameters that a module or an optimizer used while the observer was on, as far as they still live."""
        return [parameter for reference in self.parameters.values() if (parameter := reference()) is not None]

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

    def look_around(self, data: bool = False) -> None:
        """Note what every live model, optimizer and data set holds, whether or not it was used while we watched.

        With `data`, every other tensor that Python holds and that needs no gradient is noted as the batch: at the
        moment before the steps begin, that is what it is (inputs, targets, a data set kept on the device).
        """
        for module in live_objects(nn.Module):
            name = self._names.get(module, type(module).__name__)
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for part, tensor in own:
                self.see((tensor,), "parameters", f"{name}.{part}", outside=False)
                if tensor.is_leaf and tensor.grad is not None:
                    self.see((tensor.grad,), "gradients", outside=False)
        for optimizer in live_objects(torch.optim.Optimizer):
            for group in optimizer.param_groups:
                self.see(group["params"], "parameters", outside=False)
            for state in list(optimizer.state.values()):
                self.see(tensors_in(state), "optimizer_state", outside=False)
        for dataset in live_objects(torch.utils.data.Dataset):
            self.see(tensors_in(vars(dataset)), "batch", type(dataset).__name__, outside=False)
        # A parameter whose module is still being built is known by its class.
        self.see(live_objects(nn.Parameter), "parameters", outside=False)
        if data:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tensors = [t for t in live_objects(torch.Tensor) if t.is_leaf and not t.requires_grad]
            self.see(tensors, "batch", outside=False)
        self.see_gradients()

    # Hooks -----------------------------------------------------------------------------------------------------------

    @property
    def stack(self) -> list[tuple[str, int]]:
        """The modules that run forward in this thread now: (name, start), outermost first."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def _enter_module(self, module: nn.Module, inputs: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        if not self.stack and module not in self._names:
            for name, part in module.named_modules():
                self._names.setdefault(part, name or type(module).__name__)
        name = self._names.get(module, type(module).__name__)
        self.failed_in = ""
        self.stack.append((name, time.time_ns()))
        self.forward_with_grad |= torch.is_grad_enabled()
        self.see_module(module, name)
        self.see((tensor for tensor in tensors_in(inputs) if tensor.grad_fn is None), "batch", "input")

    def _leave_module(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if torch.compiler.is_compiling() or not self.stack:
            return
        name, start = self.stack.pop()
        self.spans.append(Span(start, time.time_ns(), "module", name, threading.get_ident()))
        if output is None and not self.failed_in:
            self.failed_in = name  # most likely an exception is on its way up; the innermost module is left first

    def _enter_optimizer(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            return
        self.see_optimizer(optimizer)
        self._optimizer_started[id(optimizer)] = time.time_ns()

    def _leave_optimizer(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        started = self._optimizer_started.pop(id(optimizer), None)
        if torch.compiler.is_compiling() or started is None:
            return
        self.spans.append(Span(started, time.time_ns(), "optimizer", type(optimizer).__name__))
        self.see_optimizer(optimizer)

