"""What is replaced in PyTorch while a run on fake tensors goes on, and put back after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.utils._foreach_utils
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.optim import optimizer as optimizers

from memlab.meters import live
from memlab.meters.fake_storages import FakeStorages

# Between the addresses that code is told: more than any storage has.
_APART = 2**48


@contextlib.contextmanager
def fake_addresses(storages: FakeStorages) -> Iterator[None]:
    """Inside, `memlab.meters.live` finds the made-up addresses of storages, and so does code that
    asks a tensor for its own (else all would seem to share their memory). It is seen when a storage
    gets another size.
    """
    resize = torch.UntypedStorage.resize_

    def resize_and_note(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        storages.note_size(storage)
        return storage

    def data_ptr(tensor: FakeTensor) -> int:
        begin = storages.address_of(tensor.untyped_storage()) * _APART
        return begin and begin + tensor.storage_offset() * tensor.element_size()

    begin_of, device_of = torch.UntypedStorage.data_ptr, torch.UntypedStorage.device.__get__

    def storage_device(storage: torch.UntypedStorage) -> torch.device:
        device = device_of(storage)
        # The storage of a fake tensor is on the meta device.
        return storages.device_of(storage) or device if device.type == "meta" else device

    def storage_data_ptr(storage: torch.UntypedStorage) -> int:
        if device_of(storage).type == "meta":
            return storages.address_of(storage) * _APART
        return begin_of(storage)

    def storage_clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        # As `copy.deepcopy` does: the copy has no bytes where the storage has none.
        copied = torch.UntypedStorage(storage.nbytes(), device=device_of(storage))
        return copied if device_of(storage).type == "meta" else copied.copy_(storage)

    def storage_is_cuda(storage: torch.UntypedStorage) -> bool:
        return storage_device(storage).type == "cuda"

    with (
        mock.patch.object(torch.UntypedStorage, "resize_", resize_and_note),
        mock.patch.object(torch.UntypedStorage, "clone", storage_clone),
        mock.patch.object(torch.UntypedStorage, "data_ptr", storage_data_ptr),
        mock.patch.object(torch.UntypedStorage, "device", property(storage_device)),
        mock.patch.object(torch.UntypedStorage, "is_cuda", property(storage_is_cuda)),
        mock.patch.object(live, "made_up_address", storages.address_of),
        mock.patch.object(FakeTensor, "data_ptr", data_ptr, create=True),
    ):
        yield


@contextlib.contextmanager
def random_states_seen(see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Have the copies of the host's random state noted, as a checkpoint keeps them.

    They are 5,056 bytes each, and no operator makes them.

    Args:
        see: called with each.
    """
    get_rng_state = torch.random.get_rng_state

    def seen() -> torch.Tensor:
        state = get_rng_state()
        see(state)
        return state

    with (
        mock.patch.object(torch.random, "get_rng_state", seen),
        mock.patch.object(torch, "get_rng_state", seen),
    ):
        yield


@contextlib.contextmanager
def fake_tensors_taken() -> Iterator[None]:
    """Have PyTorch's optimizers and modules take fake tensors as they take plain ones.

    By default an optimizer steps all parameters at once only if their class is `Tensor` or
    `Parameter`. And `module.to(...)` swaps a fake parameter for another one, which it refuses when
    weak references to it exist, as fake mode has them. With `parameter.data = other` a fake one
    does not learn that it is on another device now.
    """
    plain = [torch.Tensor, torch.nn.Parameter, FakeTensor]
    without_references = SimpleNamespace(getweakrefs=lambda tensor: [])
    data = torch.Tensor.data

    def set_data(tensor: FakeTensor, other: torch.Tensor) -> None:
        data.__set__(tensor, other)
        if isinstance(other, FakeTensor):
            tensor.fake_device = other.fake_device

    with (
        mock.patch.object(FakeTensor, "data", property(data.__get__, set_data), create=True),
        mock.patch.object(optimizers, "_foreach_supported_types", plain),
        mock.patch.object(torch.utils._foreach_utils, "_foreach_supported_types", plain),
        mock.patch.object(torch.utils, "weakref", without_references),
    ):
        yield


@contextlib.contextmanager
def compiled_as_eager(note: Callable[[str], None]) -> Iterator[None]:
    """Have compiled code run as it was written: what a compiler would make of it is not known."""

    def as_written(model: object = None, **options: object) -> object:
        note("compiled code needs what the same code needs without torch.compile")
        return model if model is not None else (lambda function: function)

    with (
        mock.patch.object(torch, "compile", as_written),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


@contextlib.contextmanager
def values_made_up(note: Callable[[str], None]) -> Iterator[None]:
    """Have `tensor.numpy()` return zeros, and `torch.save` save nothing: there are no values."""

    def numpy(tensor: FakeTensor, *, force: bool = False) -> np.ndarray:
        note("values that the run asks for (`.numpy()`): taken as zeros")
        with unset_fake_temporarily():
            return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape).numpy()

    def save(*arguments: object, **keywords: object) -> None:
        note("torch.save() saved nothing: there are no values")

    with (
        mock.patch.object(FakeTensor, "numpy", numpy, create=True),
        mock.patch.object(torch, "save", save),
    ):
        yield
