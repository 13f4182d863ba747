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

import torch
from torch import nn

from memlab.ledger import Observation
from memlab.meters.beside import targets_beside
from memlab.meters.gradients import Gradients, Missing
from memlab.meters.live import (
    address_of,
    live_objects,
    plain_tensors,
    role_of,
    state_of,
    storages,
    tensors_in,
    type_of,
)
from memlab.meters.models import Models
from memlab.meters.notes import Notes
from memlab.meters.uses import Use, Uses

# What a run has from elsewhere is one of these.
_USED = ("parameters", "batch", "kept", "unattributed")


class Sightings:
    """Notes the tensors that it is shown.

    Args:
        device: the device whose tensors are noted.
        record: False to keep in `latest` only what was seen last at each address.
    """

    def __init__(self, device: torch.device, *, record: bool = True):
        self.device = device
        self.latest: dict[tuple[int, str], Observation] = {}
        self._uses = Uses()
        self.devices: set[torch.device] = set()  # where the parameters of the models were
        self.before: set[int] = set()  # the addresses of what was alive before
        self.maps_before: set[int] = set()  # and of memory maps
        self.inputs: set[int] = set()  # of what a module was given
        self._given: dict[int, weakref.ref] = {}
        #: The modules by model, with their names in it.
        self.models = Models()
        self.names = self.models.names
        self.replaced: frozenset[str] = frozenset()  # what Models says at the end
        self.evaluating = False
        self._record = record
        self._notes = Notes()
        self.gradients = Gradients()
        self.missing: Missing | None = None  # at the end

    @property
    def observations(self) -> list[Observation]:
        """What was seen so far."""
        return self._notes.observations()

    def see(
        self,
        tensors: Iterable[torch.Tensor],
        column: str,
        name: str = "",
        *,
        outside: bool = True,
        model: str = "",
        role: str = "",
    ) -> None:
        """Note what these tensors are, now.

        Args:
            tensors: what was seen.
            column: what they are ("": not known, only the type is noted).
            name: which of them, a parameter's name for example.
            outside: False if the run may have nothing to do with them.
            model: the outermost module that holds them.
            role: what they are there: "trained", "frozen" or "buffer".
        """
        now = time.time_ns()
        for tensor in tensors:
            with contextlib.suppress(Exception):  # no memory of its own (lazy, functional, fake)
                for part in plain_tensors(tensor):
                    storage = part.untyped_storage()
                    if part.device != self.device or not storage.nbytes():
                        continue
                    address = address_of(storage)
                    if not self._record:
                        latest = Observation(now, address, column, name, role=role)
                        self.latest[address, column] = latest
                        continue
                    kind = (*type_of(part, storage), model, role)
                    self._notes.add(now, address, column, name, kind)
                    if outside and column in _USED:
                        self._uses.note(storage, address, now)

    def see_types(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note data types and shapes."""
        if self._record:
            self.see(tensors, "", outside=False)

    def see_module(self, module: nn.Module, prefix: str) -> None:
        """Note a module's own parameters and buffers (not its children's)."""
        model = self.models.of(module)
        for name, parameter in module.named_parameters(recurse=False):
            self._see_parameter(parameter, f"{prefix}.{name}" if prefix else name, model)
        for name, buffer in module.named_buffers(recurse=False):
            name = f"{prefix}.{name}" if prefix else name
            self.see((buffer,), "parameters", name, model=model, role="buffer")

    def _see_parameter(self, parameter: torch.Tensor, name: str, model: str = "") -> None:
        if parameter.is_meta:
            which = f"parameter {name!r}" if name else "a parameter of the optimizer"
            raise ValueError(
                f"{which} is on the meta device: it has a shape but no bytes, so there is nothing"
                f" to measure. Build the model on {self.device}, or call"
                f" .to_empty(device={str(self.device)!r}) first."
            )
        self.see((parameter,), "parameters", name, model=model, role=role_of(parameter))
        self.devices.add(parameter.device)
        self.gradients.note_parameter(parameter)

    def used_parameters(self) -> list[torch.Tensor]:
        """The parameters that a module or an optimizer used while the observer was on, as far as
        they still live.
        """
        return self.gradients.parameters()

    def see_gradients(self) -> None:
        """Note the gradients of all parameters seen."""
        for parameter in self.used_parameters():
            self._see_gradient(parameter)

    def _see_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.see((parameter.grad,), "gradients")
            self.gradients.note(parameter)

    def see_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Note an optimizer's parameters, their gradients and its state."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._see_parameter(parameter, "")
                self._see_gradient(parameter)
        self.see(state_of(optimizer), "optimizer_state")

    def look_around(self, *, before: bool = False, after: bool = False) -> None:
        """Note what every live model, optimizer and data set holds, used or not.

        What was not there before the run counts as used by it.

        Args:
            before: the steps have not begun: any other tensor that Python holds is kept (a data
                set, a copy of the weights) if it needs no gradient, and an activation if autograd
                made it. What a module is given later is the batch all the same.
            after: the steps are over: a tensor that was trained, and that no module was given, is a
                parameter. What lies beside a module's input, as targets do, is the batch.
        """
        kinds = (nn.Module, torch.optim.Optimizer, torch.utils.data.Dataset, torch.Tensor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # asking some tensors for their gradient warns
            things = live_objects(*kinds)
            self.models.find(thing for thing in things if isinstance(thing, nn.Module))
            # What the compiler made of a model comes first: the model itself has the last word.
            things.sort(key=lambda thing: not isinstance(thing, torch.fx.GraphModule))
            for thing in things:
                # These are strangers: half-built, lazy, fake, of any class.
                with contextlib.suppress(Exception):
                    if isinstance(thing, torch.Tensor) and not isinstance(thing, nn.Parameter):
                        if before or after:
                            self._look_at(thing, after)
                    else:
                        self._look_at_holder(thing)
        self.see_gradients()
        if after:
            given = [reference() for reference in list(self._given.values())]
            targets = targets_beside([tensor for tensor in given if tensor is not None])
            self.see(targets, "batch", "target", outside=False)
            self.replaced = self.models.replaced()
            self.missing = self.gradients.missing()
            self.evaluating = self.models.evaluating()

    def _look_at_holder(self, thing: object) -> None:
        """Note what a model, an optimizer or a data set holds, or a parameter on its own."""
        if isinstance(thing, nn.Module):
            name = self.names.get(thing, type(thing).__name__)
            model = self.models.of(thing)
            buffers = dict(thing.named_buffers(recurse=False))
            tensors = dict(thing.named_parameters(recurse=False)) | buffers
            for tensor_name, tensor in tensors.items():
                path = f"{name}.{tensor_name}" if name else tensor_name
                role = "buffer" if tensor_name in buffers else role_of(tensor)
                self.see((tensor,), "parameters", path, outside=False, model=model, role=role)
                if tensor.is_leaf and tensor.grad is not None:
                    self.see((tensor.grad,), "gradients", outside=False)
        elif isinstance(thing, torch.optim.Optimizer):
            for group in thing.param_groups:
                self.see(group["params"], "parameters", outside=False)
            self.see(state_of(thing), "optimizer_state", outside=False)
        elif isinstance(thing, torch.utils.data.Dataset):
            self.see(tensors_in(vars(thing)), "kept", type(thing).__name__, outside=False)
        else:
            # A parameter whose module is still being built is known by its class.
            self.see((thing,), "parameters", outside=False)

    def _look_at(self, tensor: torch.Tensor, after: bool) -> None:
        """Note a tensor that belongs to no model, optimizer or data set."""
        addresses = {address_of(storage) for storage in storages(tensor)}
        outside = not addresses & (self.before | self.maps_before)
        if tensor.grad_fn is not None:
            if not after:
                self.see((tensor,), "activations", outside=outside)
        elif not tensor.requires_grad:
            column = "kept"
            if after:
                # How long it has been there says better what it is, unless no module ever ran.
                column = "unattributed" if self.inputs else "batch"
            self.see((tensor,), column, outside=outside)
        elif after and not addresses & self.inputs:
            self.see((tensor,), "parameters", outside=outside)
        if tensor.is_leaf and tensor.grad is not None:
            self.see((tensor.grad,), "gradients", outside=outside)

    def see_input(self, tensor: torch.Tensor) -> None:
        """Note what a module was given."""
        self.see((tensor,), "batch", "input")
        with contextlib.suppress(Exception):
            self.inputs.update(address_of(storage) for storage in storages(tensor))
            self._given[id(tensor)] = weakref.ref(tensor)  # an address is soon another's

    @property
    def uses(self) -> list[Use]:
        """The storages that the run used."""
        return self._uses.found

    def end(self) -> None:
        """Follow no storage any longer."""
        self._uses.end()
