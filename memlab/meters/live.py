"""Which tensors are alive: what Python's garbage collector knows of, and the storages behind it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import warnings
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.profiler import profile

#: While a run on fake tensors is predicted: the made-up address of a storage (0: it has none).
made_up_address: Callable[[torch.UntypedStorage], int] | None = None


def address_of(storage: torch.UntypedStorage) -> int:
    """Where a storage is."""
    if made_up_address is not None and (address := made_up_address(storage)):
        return address
    return storage.data_ptr()


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that have memory, of what one tensor is made of: itself, the parts of a tensor
    subclass, sparse parts.
    """
    if hasattr(type(tensor), "__tensor_flatten__"):
        # A wrapper subclass (torchao's 8-bit state, DTensor) says by this protocol which tensors it
        # is made of.
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        if tensor.device.type != "meta":
            yield tensor
    elif tensor.layout is torch.sparse_coo:
        for part in (tensor.detach()._indices(), tensor.detach()._values()):
            yield from plain_tensors(part)
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            yield from plain_tensors(part)


def storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages that a tensor's bytes really live in: a view's base, and those of its parts."""
    for part in plain_tensors(tensor):
        yield part.untyped_storage()


def type_of(
    tensor: torch.Tensor, storage: torch.UntypedStorage
) -> tuple[str, tuple[int, ...] | None]:
    """A tensor's data type and, if it fills its storage, its shape."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    fills = tensor.numel() * tensor.element_size() == storage.nbytes()
    return dtype, tuple(tensor.shape) if fills else None


def role_of(parameter: torch.Tensor) -> str:
    """What a parameter is in its model."""
    return "trained" if parameter.requires_grad else "frozen"


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists, sets and dictionaries (model outputs too), also where
    they hold themselves.
    """
    containers, seen = [value], set()
    while containers:
        value = containers.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple, set, dict, UserDict)) and id(value) not in seen:
            seen.add(id(value))
            containers.extend(value.values() if isinstance(value, (dict, UserDict)) else value)


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """An optimizer's state, also what it keeps in attributes, lists and dictionaries of its own."""
    state = list(tensors_in(list(optimizer.state.values())))
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state", "defaults"):
            state += tensors_in(value)
    return state


#: What is ever looked for among all live objects.
_KINDS = (torch.Tensor, nn.Module, torch.optim.Optimizer, torch.utils.data.Dataset, profile)

_set_aside: list[weakref.ref] | None = None


@contextlib.contextmanager
def objects_set_aside() -> Iterator[None]:
    """Inside, the garbage collector and `live_objects` pass over what is there already: they need
    no time for it.

    A process that has imported a few libraries holds half a million objects, and to walk through
    them takes longer than a small training step. What `live_objects` looks for is still found among
    them, by weak references. Garbage of before is not collected inside; garbage that is made inside
    is.
    """
    global _set_aside
    # Objects that somebody else has frozen would not stay so. (Python 3.12 begins with a few
    # hundred of its own.)
    if _set_aside is not None or gc.get_freeze_count() > 1000:
        yield
        return
    found = []
    for thing in live_objects(*_KINDS):
        with contextlib.suppress(TypeError):  # of a class that knows no weak references
            found.append(weakref.ref(thing))
    _set_aside = found
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        _set_aside = None


@contextlib.contextmanager
def objects_brought_back() -> Iterator[None]:
    """From here on, what `objects_set_aside` has set aside is there again.

    It is not set aside anew afterwards: garbage that was made meanwhile would go with it, and stay.
    """
    global _set_aside
    if _set_aside is not None:
        gc.unfreeze()
        _set_aside = None
    yield


def live_objects(*kinds: type) -> list:
    """Every live object of some classes (subclasses of `_KINDS`) that Python's garbage collector
    knows.
    """
    # The class is asked, not the object: asking some lazily imported objects would import whole
    # packages. And each class is asked once, and no line of Python runs for each object: there are
    # so many.
    things = gc.get_objects()
    if _set_aside is not None:
        things += [thing for reference in _set_aside if (thing := reference()) is not None]
    classes = list(map(type, things))
    wanted = {kind for kind in set(classes) if issubclass(kind, kinds)}
    return list(itertools.compress(things, map(wanted.__contains__, classes)))


def live_storages(device: torch.device, *, maps: bool = False) -> dict[int, torch.UntypedStorage]:
    """Every storage on a device that a live Python tensor (or its gradient) holds, by address.

    Memory maps are excluded, or with `maps` nothing else is there.
    """
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking some tensors for their gradient warns
        for tensor in live_objects(torch.Tensor):
            # These are strangers: half-built, lazy, fake, of any class. What they raise means that
            # they hold nothing.
            with contextlib.suppress(Exception):
                if tensor.device != device:
                    continue
                parts = list(plain_tensors(tensor))
                if tensor.is_leaf and tensor.grad is not None:
                    parts += plain_tensors(tensor.grad)
                for part in parts:
                    storage = part.untyped_storage()
                    mapped = storage.filename is not None
                    if part.device == device and storage.nbytes() and mapped == maps:
                        found[address_of(storage)] = storage
    return found


def references(device: torch.device) -> dict[int, weakref.ref]:
    """A weak reference to each of those storages, by address."""
    return {place: weakref.ref(storage) for place, storage in live_storages(device).items()}
