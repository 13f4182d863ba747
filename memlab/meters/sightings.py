"""What was seen of a run: which address held what, and when.

It allocates nothing, keeps nothing alive, and knows nothing of allocators: `memlab.ledger` joins
what was seen with what a meter counted.
"""

from __future__ import annotations

import contextlib
import time
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from memlab.ledger import Observation
from memlab.meters.live import live_objects, storages, tensors_in


@dataclass(slots=True, eq=False)
class Use:
    """A storage that the run used: from when it was first seen until it was gone (nanoseconds;
    None: not yet).

    `shared`: it is shared memory without a file, as that in which a data loader's workers send.
    """

    address: int
    bytes: int
    seen: int
    gone: int | None = None
    shared: bool = False
    reference: weakref.ref | None = None


class Sightings:
    """Notes the tensors that it is shown.

    Args:
        device: the device whose tensors are noted.
        record: False to keep in `latest` only what was seen last at each address.
    """

    def __init__(self, device: torch.device, *, record: bool = True):
        self.device = device
        self.latest: dict[tuple[int, str], Observation] = {}
        self.uses: list[Use] = []
        #: Where the parameters of the models were.
        self.devices: set[torch.device] = set()
        #: The addresses of what was alive before, memory maps apart.
        self.before: set[int] = set()
        self.maps_before: set[int] = set()
        #: The addresses of what a module was given.
        self.inputs: set[int] = set()
        #: Modules by their names in the model that holds them.
        self.names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        #: The names of those whose forward was replaced, from outside their class.
        self.replaced: frozenset[str] = frozenset()
        #: Whether all of them were in eval() mode at the end.
        self.evaluating = False
        self._record = record
        # Kept in four plain lists. A tuple for each would be an object that Python's garbage
        # collector counts: it would then run more often than without the meter, and free reference
        # cycles that the run itself keeps.
        self._seen_times: list[int] = []
        self._seen_addresses: list[int] = []
        self._seen_columns: list[str] = []
        self._seen_names: list[str] = []
        self._parameters: dict[int, weakref.ref] = {}
        self._in_use: dict[int, Use] = {}

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
        return [Observation(*observation) for observation in seen]

    def see(
        self, tensors: Iterable[torch.Tensor], column: str, name: str = "", *, outside: bool = True
    ) -> None:
        """Note that these tensors are of `column`, now.

        Args:
            tensors: what was seen.
            column: what it is.
            name: which of them, a parameter's name for example.
            outside: False if the run may have nothing to do with them.
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
        shared = storage.device.type == "cpu" and storage.is_shared() and storage.filename is None
        self._in_use[address] = use = Use(address, storage.nbytes(), now, shared=shared)
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
        if parameter.is_meta:
            which = f"parameter {name!r}" if name else "a parameter of the optimizer"
            raise ValueError(
                f"{which} is on the meta device: it has a shape but no bytes, so there is nothing"
                f" to measure. Build the model on {self.device}, or call"
                f" .to_empty(device={str(self.device)!r}) first."
            )
        self.see((parameter,), "parameters", name)
        self.devices.add(parameter.device)
        known = self._parameters.get(id(parameter))
        if known is None or known() is None:  # the id of what is gone is given out again
            self._parameters[id(parameter)] = weakref.ref(parameter)

    def used_parameters(self) -> list[torch.Tensor]:
        """The parameters that a module or an optimizer used while the observer was on, as far as
        they still live.
        """
        return [
            parameter
            for reference in self._parameters.values()
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
        """Note what every live model, optimizer and data set holds, used or not.

        What was not there before the run counts as used by it.

        Args:
            before: the steps have not begun: any other tensor that Python holds is the batch
                (inputs, targets, a data set kept on the device) if it needs no gradient, and an
                activation if autograd made it.
            after: the steps are over: a tensor that was trained, and that no module was given, is a
                parameter.
        """
        kinds = (nn.Module, torch.optim.Optimizer, torch.utils.data.Dataset, torch.Tensor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # asking some tensors for their gradient warns
            for thing in live_objects(*kinds):
                # These are strangers: half-built, lazy, fake, of any class.
                with contextlib.suppress(Exception):
                    if isinstance(thing, torch.Tensor) and not isinstance(thing, nn.Parameter):
                        if before or after:
                            self._look_at(thing, after)
                    else:
                        self._look_at_holder(thing)
        self.see_gradients()
        if after:
            modules = list(self.names)
            replaced = (module for module in modules if "forward" in vars(module))
            self.replaced = frozenset(self.names[module] for module in replaced)
            self.evaluating = bool(modules) and not any(module.training for module in modules)

    def _look_at_holder(self, thing: object) -> None:
        """Note what a model, an optimizer or a data set holds, or a parameter on its own."""
        if isinstance(thing, nn.Module):
            name = self.names.get(thing, type(thing).__name__)
            parameters = thing.named_parameters(recurse=False)
            for tensor_name, tensor in (*parameters, *thing.named_buffers(recurse=False)):
                self.see((tensor,), "parameters", f"{name}.{tensor_name}", outside=False)
                if tensor.is_leaf and tensor.grad is not None:
                    self.see((tensor.grad,), "gradients", outside=False)
        elif isinstance(thing, torch.optim.Optimizer):
            for group in thing.param_groups:
                self.see(group["params"], "parameters", outside=False)
            for state in list(thing.state.values()):
                self.see(tensors_in(state), "optimizer_state", outside=False)
        elif isinstance(thing, torch.utils.data.Dataset):
            self.see(tensors_in(vars(thing)), "batch", type(thing).__name__, outside=False)
        else:
            # A parameter whose module is still being built is known by its class.
            self.see((thing,), "parameters", outside=False)

    def _look_at(self, tensor: torch.Tensor, after: bool) -> None:
        """Note a tensor that belongs to no model, optimizer or data set."""
        addresses = {storage.data_ptr() for storage in storages(tensor)}
        outside = not addresses & (self.before | self.maps_before)
        if tensor.grad_fn is not None:
            if not after:
                self.see((tensor,), "activations", outside=outside)
        elif not tensor.requires_grad:
            self.see((tensor,), "batch", outside=outside)
        elif after and not addresses & self.inputs:
            self.see((tensor,), "parameters", outside=outside)
        if tensor.is_leaf and tensor.grad is not None:
            self.see((tensor.grad,), "gradients", outside=outside)

    def see_input(self, tensor: torch.Tensor) -> None:
        """Note what a module was given."""
        self.see((tensor,), "batch", "input")
        with contextlib.suppress(Exception):  # no memory of its own
            self.inputs.update(storage.data_ptr() for storage in storages(tensor))

    def end(self) -> None:
        """Follow no storage any longer."""
        for use in self.uses:
            use.reference = None
