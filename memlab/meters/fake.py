"""Runs on shapes only: fake tensors, and the life of each of their storages as an event.

Under `FakeTensorMode` nothing is computed and nothing is allocated. `Shapes` is a mode on top of
it: it sees each operator's result, notes each new storage, and by a weak reference its end. So the
events have the order that they would have on the device.

Integers decide about shapes: lengths, indices, masks. So they are computed for real as long as they
follow from integers alone. On the host they are real tensors, on the GPU a fake one knows its
value. Where a shape or a branch depends on something else, something is assumed, and noted.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from memlab.meters.known import (
    INTEGERS,
    fake_like,
    give_values,
    is_known,
    may_make_integers,
    value_of,
    values_of,
)
from memlab.meters.live import tensors_in, type_of

#: Integers up to so many bytes are computed for real.
_REAL_BYTES = 64 * 2**20

_ITEM = torch.ops.aten._local_scalar_dense.default
_EQUAL = torch.ops.aten.equal.default
_PIN = torch.ops.aten._pin_memory.default
_UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default


class FakeMode(FakeTensorMode):
    """Fake tensors of any device, and none of the devices is touched."""

    avoid_device_init = True

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)


class Made(NamedTuple):
    """A storage that the run made, or one that is gone (`size` is negative)."""

    time: int
    address: int
    size: int
    dtype: str = ""
    shape: tuple[int, ...] | None = None


class Shapes(TorchDispatchMode):
    """Notes each storage that a run on fake tensors makes, by the device that it would be on.

    Args:
        note: called with a sentence for each thing that has to be assumed.
        on_event: called with a device's type and what was made or is gone there.
        kernels: operators for which PyTorch's fake kernel does not do, and what stands in for it.
        before: operators, and what is called before each of their calls.
    """

    def __init__(
        self,
        note: Callable[[str], None],
        on_event: Callable[[str, Made], None],
        kernels: dict[object, Callable],
        before: dict[object, Callable[[], None]],
    ):
        super().__init__()
        #: Called now and then with the number of operators since.
        self.on_progress: Callable[[int], object] | None = None
        self._operators = 0
        self._note = note
        self._on_event = on_event
        self._kernels = kernels
        self._before = before
        self._addresses: dict[int, tuple[int, weakref.ref]] = {}
        self._answers: dict[int, object] = {}
        self._made = 0
        self._last = 0

    def now(self) -> int:
        """A moment later than all before (nanoseconds)."""
        self._last = max(time.time_ns(), self._last + 1)
        return self._last

    def address_of(self, storage: torch.UntypedStorage) -> int:
        """The made-up address of a storage that the run made; 0 for any other."""
        known = self._addresses.get(id(storage))
        return known[0] if known is not None else 0

    def __torch_dispatch__(
        self, operator: object, types: tuple, arguments: tuple = (), keywords: dict | None = None
    ) -> object:
        keywords = keywords or {}
        self._operators += 1
        if not self._operators % 1000 and self.on_progress is not None:
            self.on_progress(1000)
        if operator is _ITEM:
            return self._item(arguments[0])
        if operator in self._before:
            self._before[operator]()
        if operator is _UNSCALE:  # a gradient scaler asks later whether a gradient was infinite
            self._answers[self.address_of(arguments[1].untyped_storage())] = 0.0
        result = self._call(operator, arguments, keywords)
        if isinstance(result, torch.Tensor):
            self._see(result)
            if not result.dim() and result.dtype is torch.bool and not is_known(result):
                address = self.address_of(result.untyped_storage())
                self._answers[address] = operator.__name__.startswith("all.")
        else:
            for tensor in tensors_in(result):
                self._see(tensor)
        return result

    def _call(self, operator: object, arguments: tuple, keywords: dict) -> object:
        """Call an operator: on fake tensors, and for real if it works with known integers."""
        kernel = self._kernels.get(operator)
        if operator is _PIN:
            return _copy_on_host(arguments[0])
        if kernel is not None:
            return kernel(*arguments, **keywords)
        tensors = list(tensors_in((arguments, keywords)))
        if not all(map(is_known, tensors)):
            return self._call_fake(operator, arguments, keywords, tensors)
        if not tensors and not may_make_integers(operator, keywords):
            return operator(*arguments, **keywords)
        return self._call_known(operator, arguments, keywords, tensors)

    def _call_fake(
        self, operator: object, arguments: tuple, keywords: dict, tensors: list[torch.Tensor]
    ) -> object:
        try:
            return operator(*arguments, **keywords)
        except DynamicOutputShapeException:
            raise
        except DataDependentOutputException:
            if operator is _EQUAL:
                self._note("torch.equal() of two tensors without values: taken as equal")
                return True
            raise

    def _call_known(
        self, operator: object, arguments: tuple, keywords: dict, tensors: list[torch.Tensor]
    ) -> object:
        """Compute integers, and give the fake result its value."""
        values = values_of(arguments), values_of(keywords)
        if "device" in values[1]:
            values[1]["device"] = torch.device("cpu")
        values[1].pop("pin_memory", None)
        with unset_fake_temporarily():
            value = operator(*values[0], **values[1])
        flat = list(tensors_in(value))
        fine = all(t.dtype in INTEGERS and t.nbytes <= _REAL_BYTES for t in flat)
        on_host = all(type(t) is not FakeTensor for t in tensors)
        on_host = on_host and torch.device(keywords.get("device") or "cpu").type == "cpu"
        if fine and on_host:
            return value
        try:
            result = operator(*arguments, **keywords)
        except DynamicOutputShapeException:
            device = next(t.device for t in tensors if type(t) is FakeTensor)
            result = fake_like(value, device)
        if fine:
            give_values(result, value)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        """Note the storage behind a tensor, if it is new."""
        storage = tensor.untyped_storage()
        identity = id(storage)
        if identity in self._addresses:
            return
        size = storage.nbytes()
        if not size:
            return
        device = tensor.device.type
        self._made += 1
        address = self._made
        self._on_event(device, Made(self.now(), address, size, *type_of(tensor, storage)))

        def gone(reference: weakref.ref) -> None:
            self._addresses.pop(identity, None)
            self._answers.pop(address, None)
            self._on_event(device, Made(self.now(), address, -size))

        self._addresses[identity] = address, weakref.ref(storage, gone)

    def _item(self, tensor: torch.Tensor) -> object:
        """The value of a tensor with one element, as far as it can be known."""
        value = tensor if type(tensor) is not FakeTensor else value_of(tensor)
        if value is None and type(tensor) is FakeTensor:
            value = tensor.constant
        if value is not None:
            with unset_fake_temporarily():
                return _ITEM(value)
        address = self.address_of(tensor.untyped_storage())
        if address in self._answers:
            return self._answers[address]
        if tensor.dtype is torch.bool:
            self._note("a condition that depends on values: taken as False")
            return False
        self._note("a value that the run asks for (`.item()`): taken as 1")
        return 1.0 if tensor.dtype.is_floating_point else 1


def _copy_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """What pinning makes. (CUDA's allocator of pinned memory may take more: a power of two.)"""
    if type(tensor) is FakeTensor:
        return torch.empty_like(tensor)
    with unset_fake_temporarily():
        return tensor.clone()
