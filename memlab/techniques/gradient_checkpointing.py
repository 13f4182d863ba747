"""Gradient checkpointing: keep what goes into a block, drop what it computes, compute it again in
backward.

What is saved between forward and backward falls to the inputs of the blocks, plus one block that is
whole again while backward passes through it. The price is a second forward pass: up to a third more
operations. `checkpoint` does it for one call of a function, `apply_gradient_checkpointing` for the
blocks of a model.

Sources: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), arXiv:1604.06174. The
design, hooks on saved tensors, is that of `torch.utils.checkpoint(use_reentrant=False)`: use that
in production.
"""

import inspect
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import MethodType, SimpleNamespace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import (
    TorchDispatchMode,
)  # the path in PyTorch's notes; there is no other

# --- The idea: one call of a function -------------------------------------------------------------


def checkpoint(function: Callable, /, *args, preserve_rng_state: bool = True, save=None, **kwargs):
    """Return `function(*args, **kwargs)`, keeping only the inputs: backward calls the function
    again.

    The gradients are those of a plain call, bit for bit, if the function does the same both times.
    The second call gets the inputs (also those in tuples, lists and dicts), the autocast state and
    the random state of the first (torch's, on the CPU and CUDA). What else it uses must stay:
    weights, train() or eval(), the attention backend, a cache. Batch norm counts twice. Under
    `torch.no_grad()` this is a plain call.

    preserve_rng_state: False spares a copy of the random state, 5,056 bytes on the CPU. The
        gradients are then wrong if the function draws random numbers, as dropout does.
    save: operators whose outputs are kept too: an iterable such as `MATRIX_PRODUCTS` or
        `[torch.ops.aten.mm.default]`, or a function from an operator to bool. Computed again all
        the same are views, casts, what draws random numbers and what is changed in place
        afterwards.

    Raises TypeError for any other `save`; in backward, RuntimeError if the second call saves fewer
    tensors than the first, or other shapes, dtypes or devices.
    """
    return _Record().call(function, args, kwargs, preserve_rng_state, _policy(save))


class _Slot:  # what autograd holds in place of a saved tensor
    tensor: Tensor | None = None  # there only between the second call and its use


class _Enough(BaseException):
    """Ends the second call. No Exception, so that a function which catches those lets
    it through.
    """


class _Record:
    """How to repeat a call, or a chain of calls that pass on their output. Only autograd's graph
    holds it.
    """

    def __init__(self):
        # for each call a function that repeats it, given the output of the one before
        self.repeats = []
        self.saved = []  # descriptions of the saved tensors, in the order of saving
        self.slots = (
            weakref.WeakValueDictionary()
        )  # by that order; what autograd let go need not be filled
        self.returned = lambda tensor: (
            False
        )  # whether this is the output of the last call, unchanged

    def call(
        self, function: Callable, args, kwargs, preserve_rng_state: bool, policy: Callable | None
    ):
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        chained = len(self.repeats) > 0
        inputs, kept = _hold((args[1:] if chained else args, kwargs)), None
        rng_state = _rng_state() if preserve_rng_state else []
        autocast = [
            torch.autocast(name, enabled=torch.is_autocast_enabled(name))
            for name in ("cpu", "cuda")
        ]

        def repeat(output_before):
            if policy and kept is None:
                raise RuntimeError(
                    "With save=, gradients cannot be taken inside the checkpointed function."
                )
            args, kwargs = inputs()
            args = (output_before, *args) if chained else args
            fork = torch.random.fork_rng(
                range(len(rng_state) - 1), preserve_rng_state, device_type="cuda"
            )
            with (
                fork,
                autocast[0],
                autocast[1],
                _Selection(kept=kept()) if policy else nullcontext(),
            ):
                if preserve_rng_state:
                    torch.set_rng_state(rng_state[0])
                    torch.cuda.set_rng_state_all(rng_state[1:])
                return _first(function(*args, **kwargs))

        self.repeats.append(repeat)
        selection = _Selection(policy) if policy else nullcontext()
        with saved_tensors_hooks(self.pack, self.unpack), selection:
            output = function(*args, **kwargs)
        kept = _hold(selection.unchanged()) if policy else None
        if isinstance(first := _first(output), Tensor):
            last, version = weakref.ref(first), first._version
            self.returned = lambda tensor: tensor is last() and tensor._version == version
        return output

    def pack(self, tensor: Tensor) -> _Slot:
        """In forward, autograd calls this for each tensor that it is to save."""
        slot = self.slots[len(self.saved)] = _Slot()
        self.saved.append(_describe(tensor))
        return slot

    def unpack(self, slot: _Slot) -> Tensor:
        """In backward, autograd calls this for each tensor that it needs."""
        if slot.tensor is None:
            self.fill_slots()
        # Emptied at once: memory falls while backward walks the block, and a second backward starts
        # afresh.
        tensor, slot.tensor = slot.tensor, None
        return tensor

    def fill_slots(self) -> None:
        """Repeat the calls, up to the last tensor that somebody still needs."""
        indices, last, output = iter(range(len(self.saved))), max(self.slots), None

        def fill(tensor: Tensor) -> Tensor:
            index, tensor = next(indices), tensor.detach()
            self.check(index, _describe(tensor))
            if index in self.slots:
                self.slots[index].tensor = tensor
            if index == last:
                raise _Enough
            return tensor

        with (
            suppress(_Enough),
            torch.enable_grad(),
            saved_tensors_hooks(fill, lambda tensor: tensor),
        ):
            for repeat in self.repeats:
                output = repeat(output)
            self.check(next(indices), "missing")

    def check(self, index: int, now: str) -> None:
        if now != (before := self.saved[index]):
            raise RuntimeError(
                f"Saved tensor {index} was {before} in the first call, now {now}. Both calls must"
                " do the same. Look for a cache that grows (Hugging Face: pass use_cache=False),"
                " train() or eval()."
            )


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _first(output):
    return output[0] if isinstance(output, tuple | list) and output else output


def _rng_state() -> list[Tensor]:
    # Of all GPUs: the arguments do not tell which ones the function uses, and a GPU's state is 16
    # bytes.
    return [
        torch.get_rng_state(),
        *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []),
    ]


class _Hold(torch.autograd.Function):
    """Saves a tensor as an operator does: outer hooks see it, as those of a checkpoint around this
    one, and a change in place is noticed. Its result enters no loss, so it has no backward."""

    @staticmethod
    def forward(ctx, anchor, tensor):
        ctx.save_for_backward(tensor)
        return anchor.clone()


def _hold(structure) -> Callable:
    """Hold the tensors in nested tuples, lists and dicts; calling the result gives all
    of it back.
    """
    kind = type(structure)
    if isinstance(structure, Tensor):
        # Detached: the graph of what a call returned holds the hooks, and those hold this.
        holder = _Hold.apply(torch.empty(0, device="cpu", requires_grad=True), structure.detach())
        needs_grad = structure.requires_grad
        return lambda: holder.grad_fn.saved_tensors[0].detach().requires_grad_(needs_grad)
    if kind in (tuple, list, dict):
        items = [_hold(item) for item in (structure.items() if kind is dict else structure)]
        return lambda: kind(item() for item in items)
    return lambda: structure


# --- The selective policy: what is worth keeping --------------------------------------------------

# For `save=`: matrix products and fused attention, which cost most operations for each byte kept.
MATRIX_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
)


def _policy(save) -> Callable | None:
    if save is None or inspect.isroutine(save):
        return save
    operators = set(save) if hasattr(save, "__iter__") else {save}
    if not all(isinstance(operator, type(torch.ops.aten.mm.default)) for operator in operators):
        raise TypeError(
            f"save must be operators, as torch.ops.aten.mm.default, or a function: not {save!r}"
        )
    return operators.__contains__


class _Selection(TorchDispatchMode):
    """Every operator passes through here: the first call notes outputs to keep, the second returns
    them.
    """

    def __init__(self, policy: Callable = lambda operator: False, kept: dict | None = None):
        super().__init__()
        self.policy, self.kept, self.outputs = policy, kept or {}, {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kept = self.kept.get(operator)
        if kept and (output := kept.pop(0)) is not None:
            return output
        # The two calls differ in casts, which autocast remembers, and in views: the hooks detach.
        keep = (
            not operator.is_view and operator.name() != "aten::_to_copy" and self.policy(operator)
        )
        before = _rng_state() if keep and torch.Tag.nondeterministic_seeded in operator.tags else []
        output = operator(*args, **(kwargs or {}))
        # What moved the random state (attention, if it has dropout) has to move it in the second
        # call too.
        keep = keep and all(map(torch.equal, before, _rng_state()))
        self.outputs.setdefault(operator, []).append(output if keep else None)
        return output

    def unchanged(self) -> dict:
        """For each operator the outputs of its calls; None for those not kept, or changed in place
        since.
        """
        for outputs in self.outputs.values():
            for index, output in enumerate(outputs):
                tensors = output if isinstance(output, tuple | list) else [output]
                if any(tensor._version > 0 for tensor in tensors if isinstance(tensor, Tensor)):
                    outputs[index] = None
        return self.outputs


# --- Applying it from outside ---------------------------------------------------------------------


def apply_gradient_checkpointing(
    model: nn.Module,
    blocks=None,
    *,
    segments=None,
    every=1,
    save=None,
    preserve_rng_state: bool = True,
):
    """Give the repeated blocks of a model a `forward` with `checkpoint`; `remove()` on the result
    undoes it.

    blocks: the modules in the order of their calls, or their class. None takes the longest list
        (ModuleList, Sequential) of modules of one class, leaving out lists inside such modules.
    every: checkpoint the first block and one in so many after it; the others stay as they are.
    segments: instead, split the blocks into so many segments, equally long or one apart, and
    recompute each
        as a whole: fewer inputs to keep, more to hold at once in backward. A block whose first
            argument is not what the one before returned (of a tuple, the first) has its inputs kept
            all the same.
    save, preserve_rng_state: as for `checkpoint`.

    Raises ValueError for blocks that cannot be found or are checkpointed already, and for counts
    out of range; `remove()` raises RuntimeError if something else has replaced the `forward` of a
    block since.
    """
    blocks, policy = _find_blocks(model, blocks), _policy(save)
    if segments is not None and every != 1:
        raise ValueError(f"Give segments or every, not both: they are {segments} and {every}.")
    count = len(blocks) if segments is None else segments
    for name, number in (("every", every), ("segments", count)):
        if not isinstance(number, int) or not 1 <= number <= len(blocks):
            raise ValueError(
                f"{name} must be an int from 1 to {len(blocks)}, but it is {number!r}."
            )
    starts = [blocks[len(blocks) * index // count] for index in range(count)]
    forwards, last = weakref.WeakKeyDictionary(), SimpleNamespace(record=lambda: None)
    for block in blocks[::every]:
        forwards[block] = block.forward = _Forward(
            block, block in starts, last, preserve_rng_state, policy
        )

    def remove() -> None:
        if any(vars(block).get("forward") is not forward for block, forward in forwards.items()):
            raise RuntimeError("Something replaced the forward of a block since: undo that first.")
        for block, forward in forwards.items():
            del block.forward
            if forward.previous is not None:
                block.forward = forward.previous
        forwards.clear()

    return SimpleNamespace(remove=remove)


class _Forward:
    """The `forward` of a checkpointed block. It holds the block weakly: otherwise a deleted model
    would be a cycle and stay in memory until the garbage collector came."""

    def __init__(self, block: nn.Module, starts_segment: bool, last: SimpleNamespace, *options):
        self.block, self.previous = weakref.ref(block), vars(block).get("forward")
        self.starts_segment, self.last, self.options = starts_segment, last, options
        self.__signature__ = inspect.signature(block.forward)

    def __call__(self, *args, **kwargs):
        record, hidden = self.last.record(), args[0] if args else None
        if self.starts_segment or record is None or hidden is None or not record.returned(hidden):
            record = _Record()
            self.last.record = weakref.ref(record)
        original = self.previous or MethodType(type(self.block()).forward, self.block())
        return record.call(original, args, kwargs, *self.options)

    def __reduce__(self):
        raise TypeError(
            "This model has gradient checkpointing: remove() it before copying or pickling."
        )


def _find_blocks(model: nn.Module, blocks) -> list[nn.Module]:
    modules = list(model.modules())
    if blocks is None:
        lists = [m for m in modules if isinstance(m, nn.ModuleList | nn.Sequential)]
        lists = [m for m in lists if len({type(block) for block in m}) == 1]
        inner = {module for outer in lists for block in outer for module in block.modules()}
        blocks = max((module for module in lists if module not in inner), key=len, default=[])
    elif isinstance(blocks, type):
        blocks = [module for module in modules if isinstance(module, blocks)]
    blocks = list(dict.fromkeys(blocks))
    if not blocks or not set(modules).issuperset(blocks):
        raise ValueError(
            f"No blocks found in {type(model).__name__}: pass blocks=, a list or a class."
        )
    if any(isinstance(block.forward, _Forward) for block in blocks):
        raise ValueError(
            "Gradient checkpointing is applied to these blocks already: remove() it first."
        )
    return blocks
