"""Runs on shapes only: fake tensors, and the life of each of their storages as an event.

Under `FakeTensorMode` nothing is computed and nothing is allocated. `Shapes` is a mode on top of
it: it sees each operator's result, notes each new storage, and by a weak reference its end. So the
events have the order that they would have on the device.

Integers decide about shapes: lengths, indices, masks. So they are computed for real as long as they
follow from integers alone. On the host they are real tensors, on the GPU a fake one knows its
value. Where a shape or a branch depends on something else, something is assumed, and noted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from memlab.meters.fake_kernels import SET_STORAGE, copy_on_host, set_storage
from memlab.meters.fake_storages import FakeStorages, Made
from memlab.meters.gradient_sums import is_gradient_sum
from memlab.meters.known import (
    INTEGERS,
    fake_like,
    give_values,
    is_composed,
    is_known,
    may_make_integers,
    value_of,
    values_of,
)
from memlab.meters.live import tensors_in
from memlab.meters.scratch import Scratch
from memlab.meters.worst_cases import worst_case

_PLAIN = {torch.Tensor, torch.nn.Parameter, FakeTensor}

#: Integers up to so many bytes are computed for real.
_REAL_BYTES = 64 * 2**20

_ITEM = torch.ops.aten._local_scalar_dense.default
_EQUAL = torch.ops.aten.equal.default
_IS_PINNED = torch.ops.aten.is_pinned.default
_PIN = torch.ops.aten._pin_memory.default
_UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default


class FakeMode(FakeTensorMode):
    """Fake tensors of any device, and none of the devices is touched."""

    avoid_device_init = True

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)


class Shapes(TorchDispatchMode):
    """Notes each storage that a run on fake tensors makes, by the device that it would be on.

    Args:
        note: called with a sentence for each thing that has to be assumed.
        on_event: called with a device's type and what was made or is gone there.
        kernels: operators for which PyTorch's fake kernel does not do, and what stands in for it.
        before: operators, and what is called before each of their calls.
        scratch: what kernels on the GPU take for themselves (`kernel_scratch.scratch_of`).
    """

    def __init__(
        self,
        note: Callable[[str], None],
        on_event: Callable[[str, Made], None],
        kernels: dict[object, Callable],
        before: dict[object, Callable[[], None]],
        scratch: Callable[..., Sequence[Scratch]] = lambda *call: (),
    ):
        super().__init__()
        #: Called now and then with the number of operators since.
        self.on_progress: Callable[[int], object] | None = None
        #: While this is true, what operators make is no part of the run.
        self.set_aside = False
        self._operators = 0
        self._note = note
        self.storages = FakeStorages(on_event)
        self._kernels = kernels
        self._before = before
        self._scratch = scratch
        self._answers: dict[int, object] = {}
        self._in_pinned_memory: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, operator: object, types: tuple, arguments: tuple = (), keywords: dict | None = None
    ) -> object:
        if not _PLAIN.issuperset(types):
            # A tensor made of others (DTensor, torchao's): its class calls operators on those.
            return NotImplemented
        keywords = keywords or {}
        if self.set_aside:
            return operator(*arguments, **keywords)
        self.storages.settle()
        self._operators += 1
        if not self._operators % 1000 and self.on_progress is not None:
            self.on_progress(1000)
        if operator is _ITEM:
            return self._item(arguments[0])
        if operator in self._before:
            self._before[operator]()
        if operator is _UNSCALE:  # a gradient scaler asks later whether a gradient was infinite
            self._answers[self.storages.address_of(arguments[1].untyped_storage())] = 0.0
        sum_with = None
        if is_gradient_sum(operator, arguments):
            sum_with = arguments[0]
            result = torch.empty_like(sum_with)  # in place it has the strides of the first
        else:
            result = self._call(operator, arguments, keywords)
        if isinstance(result, torch.Tensor):
            self.storages.see(result, sum_with)
            if not result.dim() and result.dtype is torch.bool and not is_known(result):
                address = self.storages.address_of(result.untyped_storage())
                self._answers[address] = operator.__name__.startswith("all.")
        else:
            for tensor in reversed(list(tensors_in(result))):  # it gives the last one first
                self.storages.see(tensor)
        buffers = self._scratch(operator, arguments, keywords, result)
        if buffers and next(tensors_in(arguments)).device.type == "cuda":
            self.storages.take(buffers)
        return result

    def _call(self, operator: object, arguments: tuple, keywords: dict) -> object:
        """Call an operator: on fake tensors, and for real if it works with known integers."""
        kernel = self._kernels.get(operator)
        if operator is _PIN:
            return self._pinned(copy_on_host(arguments[0]))
        if operator is _IS_PINNED:
            return arguments[0].untyped_storage() in self._in_pinned_memory
        if keywords.get("pin_memory"):
            keywords = {**keywords, "pin_memory": False}
            return self._pinned(self._call(operator, arguments, keywords))
        if is_composed(operator):
            with self:  # it arrives whole in inference mode, and its parts are to be seen
                return (kernel or operator.decompose)(*arguments, **keywords)
        if kernel is not None:
            return kernel(*arguments, **keywords)
        tensors = list(tensors_in((arguments, keywords)))
        refuse_parameters_from_before(tensors)
        if operator in SET_STORAGE:
            return set_storage(operator, arguments, keywords)
        if not all(map(is_known, tensors)):
            return self._call_fake(operator, arguments, keywords, tensors)
        if not tensors and not may_make_integers(operator, keywords):
            return operator(*arguments, **keywords)
        return self._call_known(operator, arguments, keywords, tensors)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        self._in_pinned_memory.add(tensor.untyped_storage())
        return tensor

    def _call_fake(
        self, operator: object, arguments: tuple, keywords: dict, tensors: list[torch.Tensor]
    ) -> object:
        try:
            return operator(*arguments, **keywords)
        except DynamicOutputShapeException:
            return worst_case(operator, arguments, keywords, self._note)
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

    def _item(self, tensor: torch.Tensor) -> object:
        """The value of a tensor with one element, as far as it can be known."""
        value = tensor if type(tensor) is not FakeTensor else value_of(tensor)
        if value is None and type(tensor) is FakeTensor:
            value = tensor.constant
        if value is not None:
            with unset_fake_temporarily():
                return _ITEM(value)
        address = self.storages.address_of(tensor.untyped_storage())
        if address in self._answers:
            return self._answers[address]
        if tensor.dtype is torch.bool:
            self._note("a condition that depends on values: taken as False")
            return False
        self._note("a value that the run asks for (`.item()`): taken as 1")
        return 1.0 if tensor.dtype.is_floating_point else 1


def refuse_parameters_from_before(tensors: list[torch.Tensor]) -> None:
    """Refuse a parameter that is no fake one.

    Raises:
        ValueError: there is one. So a model of before stays what it was.
    """
    for tensor in tensors:
        if type(tensor) is torch.nn.Parameter:
            raise ValueError(
                "the model was built before the prediction began: its parameters (one of shape"
                f" {tuple(tensor.shape)}) have values. Build the model inside the run: what is"
                " predicted runs on tensors that have shapes only."
            )
