"""Gradient checkpointing: keep what goes into a block, drop what it computes, compute it again in backward.

What is saved between forward and backward falls to the inputs of the blocks, plus one block that is whole
again while backward passes through it. The price is a second forward pass: up to a third more operations in a
training step.

`checkpoint` does this for one call of a function, `apply_gradient_checkpointing` for the blocks of a model.
Both are for eager mode; what `torch.compile` knows is `torch.utils.checkpoint`.

Sources: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), arXiv:1604.06174. The design,
hooks on saved tensors, is that of `torch.utils.checkpoint` with `use_reentrant=False`.
"""

import inspect
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode  # the path in PyTorch's notes; there is no other

# For `save=`: matrix products and fused attention, which cost most operations for each byte kept.
MATRIX_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "convolution",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
)  # fmt: skip


def checkpoint(function: Callable, /, *args, preserve_rng_state: bool = True, save=None, **kwargs):
    """Return `function(*args, **kwargs)`, keeping only the inputs: backward calls the function again.

    The gradients are those of a plain call, bit for bit, when the function does the same both times. The
    second call gets the first one's autocast state and random state (torch's, on the CPU and CUDA; not
    Python's or NumPy's). Whatever else it depends on must not change in between: weights, train() or eval(),
    the attention backend, a cache it appends to. What it does beside computing it does twice: batch norm
    updates its running statistics twice. Under `torch.no_grad()` this is a plain call.

    preserve_rng_state: False spares a copy of the random state for each call (5,056 bytes for the CPU's). The
        gradients are then wrong if the function draws random numbers, as dropout does.
    save: operators whose outputs are kept too, so that they are not computed again: an iterable of operators
        such as `MATRIX_PRODUCTS` or `[torch.ops.aten.mm.default]`, or a function from an operator to bool. An
        output that the function changes in place afterwards is computed again all the same.

    Raises TypeError for any other `save`. In backward, raises RuntimeError when the second call saves fewer
    tensors than the first, or other shapes, dtypes or devices, or when a weight was changed in place in
    between.
    """
    return _checkpoint(function, args, kwargs, preserve_rng_state, _policy(save))


def _checkpoint(function, args, kwargs, preserve_rng_state, policy):
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    call = _Call(function, args, kwargs, preserve_rng_state)
    record = _Record(call, policy) if policy else None
    with saved_tensors_hooks(call.pack, call.unpack), record or nullcontext():
        output = function(*args, **kwargs)
    if record:
        record.hand_over()
    if preserve_rng_state and torch.cuda.is_initialized() and not call.cuda_was_initialized:
        raise RuntimeError(
            "CUDA was first used inside a checkpointed function, so its random state at the start is not "
            "known. Call torch.cuda.init() before the model, or pass preserve_rng_state=False."
        )
    return output


class _Slot:
    """What autograd holds in place of a saved tensor; full only between the second call and its use."""

    value: Tensor | None = None


class _Enough(BaseException):
    """Ends the second call. No Exception, so that a function which catches those lets it through."""


class _Call:
    """One call of a function and what it takes to repeat it. The autograd graph alone holds it."""

    def __init__(self, function, args, kwargs, preserve_rng_state):
        self.function = function
        tensors = []
        self.arguments = _take_out((args, kwargs), tensors)
        self.inputs = _hold(tensors)
        self.cuda_was_initialized = torch.cuda.is_initialized()
        self.rng_state = _rng_state() if preserve_rng_state else None
        accelerator = torch.accelerator.current_accelerator()
        self.autocast = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device),
             torch.is_autocast_cache_enabled())
            for device in {"cpu", accelerator.type if accelerator else "cpu"}
            if torch.amp.is_autocast_available(device)
        ]  # fmt: skip
        self.slots = []  # in order of saving; weak, since a slot that autograd has let go needs no tensor
        self.saved = []  # for each slot a description of the tensor and, if that is a weight, its version
        self.kept = {}  # operator -> for each of its calls what to return, or None; its tensors:
        self.kept_tensors = None

    def pack(self, tensor: Tensor) -> _Slot:
        slot = _Slot()
        self.slots.append(weakref.ref(slot))
        self.saved.append((_describe(tensor), _weight_version(tensor)))
        return slot

    def unpack(self, slot: _Slot) -> Tensor:
        if slot.value is None:
            self.repeat()
        # Emptied at once: memory falls while backward walks the block, and a second backward starts afresh.
        value, slot.value = slot.value, None
        return value

    def repeat(self) -> None:
        slots = [slot() for slot in self.slots]
        last = max(index for index, slot in enumerate(slots) if slot is not None)
        count = 0

        def fill(tensor: Tensor) -> Tensor:
            nonlocal count
            index, count = count, count + 1
            self.check(index, tensor)
            tensor = tensor.detach()
            if slots[index] is not None:
                slots[index].value = tensor
            if index == last:
                raise _Enough
            return tensor

        args, kwargs = _map(_Place, _held(self.inputs).__getitem__, self.arguments)
        with ExitStack() as stack:
            if self.rng_state is not None:
                devices = [device for device in self.rng_state if device != "cpu"]
                stack.enter_context(torch.random.fork_rng(devices, device_type="cuda"))
                _set_rng_state(self.rng_state)
            for state in self.autocast:
                stack.enter_context(torch.autocast(*state))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(fill, lambda tensor: tensor))
            if self.kept_tensors is not None:
                stack.enter_context(_Replay(self.kept, _held(self.kept_tensors)))
            try:
                self.function(*args, **kwargs)
            except _Enough:
                return
        raise RuntimeError(f"The first call saved {len(self.saved)} tensors, the second {count}. {_ADVICE}")

    def check(self, index: int, tensor: Tensor) -> None:
        before, version = self.saved[index]
        if before != (now := _describe(tensor)):
            raise RuntimeError(f"Saved tensor {index} was {before} in the first call, now {now}. {_ADVICE}")
        if None not in (version, current := _weight_version(tensor)) and version != current:
            raise RuntimeError(
                f"A weight ({before}) was changed in place between forward and the backward that needs it, "
                "perhaps by an optimizer step: the function can no longer be repeated. Run forward anew."
            )


_ADVICE = (
    "A checkpointed function must do the same in both calls. Look for a cache that grows (Hugging Face: pass "
    "use_cache=False), random numbers from outside torch, a change between train() and eval() or of the "
    "attention backend."
)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _weight_version(tensor: Tensor) -> int | None:
    """How often the weight that this is, or is a view of, was changed; None where it is no weight."""
    weight = tensor if tensor._base is None else tensor._base
    return weight._version if isinstance(weight, nn.Parameter) else None


class _Hold(torch.autograd.Function):
    """Saves tensors as an operator does: outer hooks see them (a checkpoint around this one, an offload, a
    meter) and a change in place is noticed. Its result enters no loss, so it has no backward."""

    @staticmethod
    def forward(ctx, anchor, *tensors):
        ctx.save_for_backward(*tensors)
        return anchor.clone()


def _hold(tensors: list[Tensor]) -> Tensor:
    return _Hold.apply(torch.empty(0, device="cpu", requires_grad=True), *tensors)


def _held(holder: Tensor) -> tuple[Tensor, ...]:
    return holder.grad_fn.saved_tensors


class _Place(int):
    """Stands in a structure for the tensor with this index in a list."""


def _map(kind: type, function: Callable, structure):
    """Apply the function to what is of this kind in nested tuples, lists and dicts; the rest stays."""
    if isinstance(structure, kind):
        return function(structure)
    if type(structure) in (tuple, list):
        return type(structure)(_map(kind, function, item) for item in structure)
    if type(structure) is dict:
        return {key: _map(kind, function, item) for key, item in structure.items()}
    return structure


def _take_out(structure, tensors: list[Tensor]):
    """Append the tensors of a structure to a list and return the structure with places instead."""
    return _map(Tensor, lambda tensor: tensors.append(tensor) or _Place(len(tensors) - 1), structure)


def _rng_state() -> dict:
    # All devices: the arguments do not tell which ones the function uses, and a GPU's state is 16 bytes.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return {"cpu": torch.get_rng_state()} | {device: torch.cuda.get_rng_state(device) for device in devices}


def _set_rng_state(states: dict) -> None:
    for device, state in states.items():
        torch.set_rng_state(state) if device == "cpu" else torch.cuda.set_rng_state(state, device)


def _policy(save) -> Callable | None:
    operator_type, packet_type = type(torch.ops.aten.mm.default), type(torch.ops.aten.mm)
    if save is None or (callable(save) and not isinstance(save, operator_type | packet_type)):
        return save
    operators = set(save) if hasattr(save, "__iter__") and not isinstance(save, packet_type) else {save}
    for operator in operators:
        if not isinstance(operator, operator_type):
            raise TypeError(
                "save must be operators such as torch.ops.aten.mm.default (not torch.ops.aten.mm) or a "
                f"function from an operator to bool, but there is {operator!r}."
            )
    return operators.__contains__


class _Record(TorchDispatchMode):
    """In the first call: note the outputs to keep."""

    def __init__(self, call: _Call, policy: Callable):
        super().__init__()
        self.call, self.policy = call, policy
        self.entries = defaultdict(list)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        keep = operator is not torch.ops.aten.detach.default and self.policy(operator)  # the hooks detach too
        # Attention with dropout, though not run again, must move the random state on for what follows it.
        random = keep and self.call.rng_state and torch.Tag.nondeterministic_seeded in operator.tags
        before = _rng_state() if random else {}
        output = operator(*args, **(kwargs or {}))
        after = _rng_state() if random else {}
        moved = {device: state for device, state in after.items() if not torch.equal(state, before[device])}
        entry = (output, _versions(output), moved, len(self.call.slots)) if keep else None
        self.entries[operator].append(entry)
        return output

    def hand_over(self) -> None:
        tensors = []

        def finish(output, versions, moved, saved_before):
            # Changed in place since (or by the operator itself, whose change counts once it has returned), it
            # must be computed again. After the last saved tensor nothing is, so nothing is worth keeping.
            useful = versions == _versions(output) and saved_before < len(self.call.slots)
            return (_take_out(output, tensors), moved) if useful else None

        for operator, entries in self.entries.items():
            self.call.kept[operator] = [entry and finish(*entry) for entry in entries]
        # Detached: a tensor's graph holds the hooks, they hold the call, and the call would hold the tensor.
        self.call.kept_tensors = _hold([tensor.detach() for tensor in tensors])


class _Replay(TorchDispatchMode):
    """In the second call: return what was kept."""

    def __init__(self, kept: dict, tensors):
        super().__init__()
        self.kept, self.tensors = kept, [tensor.detach() for tensor in tensors]
        self.counts = defaultdict(int)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        index = self.counts[operator]
        self.counts[operator] += 1
        entry = self.kept[operator][index] if index < len(self.kept.get(operator, ())) else None
        if entry is None:
            return operator(*args, **(kwargs or {}))
        output, moved = entry
        _set_rng_state(moved)
        return _map(_Place, self.tensors.__getitem__, output)


def _versions(output) -> list[int]:
    tensors = []
    _take_out(output, tensors)
    return [tensor._version for tensor in tensors]


def apply_gradient_checkpointing(
    model: nn.Module,
    blocks=None,
    *,
    segments: int | None = None,
    every: int = 1,
    save=None,
    preserve_rng_state: bool = True,
) -> "CheckpointingHandle":
    """Checkpoint the repeated blocks of a model from outside; `remove()` on the result undoes it.

    The chosen blocks get a `forward` of their own. Classes, parameters, `state_dict` and hooks stay as they
    are, and without gradients (`torch.no_grad()`) the blocks run as ever.

    blocks: the modules in the order of their calls, or their class. None takes the longest `nn.ModuleList` of
        modules of one class, leaving out lists inside such modules.
    every: checkpoint the first block and one in so many after it; the others stay as they are.
    segments: instead, split the blocks into this many segments, equally long or one apart, and recompute each
        as a whole: fewer inputs to keep, more to hold at once in backward. The first block of a segment
        computes all of it, the others return their share. This needs blocks that are called once each, in
        order, with the output of the block before (its first element, if that is a tuple) as first argument
        and the same other arguments; each call is checked, and RuntimeError raised.
    save, preserve_rng_state: as for `checkpoint`.

    Remove it before copying or pickling the model (TypeError otherwise). Raises ValueError for blocks that
    cannot be found or are not in the model, for counts out of range, and for blocks that are checkpointed
    already.
    """
    blocks = _find_blocks(model, blocks)
    if segments is not None and every != 1:
        raise ValueError(f"Give segments or every, not both: they are {segments} and {every}.")
    for name, number in (("every", every), ("segments", 1 if segments is None else segments)):
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= len(blocks):
            raise ValueError(f"{name} must be an int from 1 to {len(blocks)}, but it is {number!r}.")
    if segments is None:
        parts = [[block] for block in blocks[::every]]
    else:
        cuts = [len(blocks) * index // segments for index in range(segments + 1)]
        parts = [blocks[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)]
    policy = _policy(save)
    return CheckpointingHandle([_Segment(part, preserve_rng_state, policy) for part in parts])


class CheckpointingHandle:
    """Undoes `apply_gradient_checkpointing`."""

    def __init__(self, segments: list["_Segment"]):
        self._forwards = [forward for segment in segments for forward in segment.forwards]
        for forward in self._forwards:
            forward.block().forward = forward

    def remove(self) -> None:
        """Give the blocks back the `forward` they had; a second call does nothing.

        Raises RuntimeError when something else has replaced the `forward` of a block since: undo that first.
        """
        alive = [(block, forward) for forward in self._forwards if (block := forward.block()) is not None]
        if any(vars(block).get("forward") is not forward for block, forward in alive):
            raise RuntimeError("Something replaced the forward of a block since: undo that first.")
        for block, forward in alive:
            del block.forward
            if forward.previous is not None:
                block.forward = forward.previous
        self._forwards = []


class _BlockForward:
    """The `forward` of a checkpointed block. It holds the block weakly: otherwise a deleted model would be a
    cycle and stay in memory until the garbage collector came."""

    def __init__(self, block: nn.Module, segment: "_Segment"):
        self.block, self.segment = weakref.ref(block), segment
        self.previous = vars(block).get("forward")
        self.__signature__ = inspect.signature(block.forward)

    def original(self) -> Callable:
        return self.previous or partial(type(self.block()).forward, self.block())

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.original()(*args, **kwargs)
        return self.segment.call(self, args, kwargs)

    def __reduce__(self):
        raise TypeError("This model has gradient checkpointing: remove() it before copying or pickling.")


class _Segment:
    """Blocks that are recomputed together; most often one."""

    def __init__(self, blocks: list[nn.Module], preserve_rng_state: bool, policy: Callable | None):
        self.forwards = [_BlockForward(block, self) for block in blocks]
        self.options = preserve_rng_state, policy
        self.outputs = deque()  # computed, and waiting for the calls of their blocks
        self.expected = None  # the arguments of the next of these calls

    def call(self, forward: _BlockForward, args: tuple, kwargs: dict):
        if forward is self.forwards[0]:
            originals = [forward.original() for forward in self.forwards]
            self.outputs = deque(_checkpoint(partial(_in_turn, originals), args, kwargs, *self.options))
        elif (
            not self.outputs
            or forward is not self.forwards[-len(self.outputs)]
            or not _same(self.expected, (args, kwargs))
        ):
            self.outputs, self.expected = deque(), None
            raise RuntimeError(
                "The blocks of a segment must be called one after another, each with the output of the one "
                f"before and the same other arguments; a {type(forward.block()).__name__} was not. "
                "Use every= in place of segments=."
            )
        output = self.outputs.popleft()
        self.expected = ((_hidden(output), *args[1:]), kwargs) if self.outputs else None
        return output


def _in_turn(forwards: list[Callable], *args, **kwargs) -> list:
    outputs = [forwards[0](*args, **kwargs)]
    for forward in forwards[1:]:
        outputs.append(forward(_hidden(outputs[-1]), *args[1:], **kwargs))
    return outputs


def _hidden(output) -> Tensor:
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"A block of a segment must return a tensor or a tuple with one first, not {hidden!r:.60}"
        )
    return hidden


def _same(one, other) -> bool:
    """Whether two structures hold the same objects, or equal plain values."""
    if type(one) is type(other) and isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if type(one) is type(other) is dict:
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other or (isinstance(one, bool | int | float | str) and one == other)


def _find_blocks(model: nn.Module, blocks) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    name, advice = type(model).__name__, "Pass blocks=, a list of the modules to checkpoint, or their class."
    if blocks is None:
        lists = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        }
        outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
        if not outermost:
            raise ValueError(f"{name} has no nn.ModuleList of modules of one class. {advice}")
        blocks = max((lists[path] for path in outermost), key=len)
    elif isinstance(blocks, type):
        blocks = [module for module in model.modules() if isinstance(module, blocks)]
    blocks = list(dict.fromkeys(blocks))
    if not blocks or not set(model.modules()).issuperset(blocks):
        raise ValueError(f"blocks must be modules of the {name}, one at least. {advice}")
    if any(isinstance(vars(block).get("forward"), _BlockForward) for block in blocks):
        raise ValueError("Gradient checkpointing is applied to these blocks already: remove() it first.")
    return blocks
