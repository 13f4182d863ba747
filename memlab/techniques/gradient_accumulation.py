"""Gradient accumulation: run a large batch as micro-batches, add up their gradients, step once.

Activations fall to those of one micro-batch. The price: all gradients are alive during forward.
- `accumulate_gradients` gives the gradients of the large batch, whatever the micro-batches' sizes.
- `optimizer_in_backward` steps each parameter when its gradient is complete, and frees the
  gradient. That excludes accumulation, where no gradient is complete before the last micro-batch.
- `apply_layer_major_micro_batches` makes both possible: all micro-batches pass a layer before the
  next. It keeps the layers' inputs for the whole batch and recomputes the rest: up to a third more
  operations.

Sources: the weighting, https://huggingface.co/blog/gradient_accumulation (2024); the optimizer in
backward, https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html
and Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (2023),
arXiv:2306.09782.
"""

import contextlib
import functools
import inspect
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# --- Micro-batches, and the gradients of the large batch ------------------------------------------


def split_batch(
    batch: Iterable[Tensor] | Mapping[str, Tensor], micro_batch_size: int
) -> list[tuple[Tensor, ...]] | list[dict[str, Tensor]]:
    """Cut a batch into micro-batches, as views; the last one has the rest.

    Args:
        batch: Tensors, each (batch, ...), or a dict of them, as a tokenizer of Hugging Face returns
            it with `return_tensors="pt"`.
        micro_batch_size: Rows of a micro-batch.

    Returns:
        The micro-batches: tuples of tensors, or dicts if the batch is one.

    Raises:
        TypeError: Something in the batch is no tensor.
        ValueError: The tensors are not equally long, there are none, or the size is below 1.
    """
    named = isinstance(batch, Mapping)
    tensors = tuple(batch.values() if named else batch)
    _check_size(micro_batch_size)
    for name, tensor in zip(batch if named else range(len(tensors)), tensors, strict=True):
        if not isinstance(tensor, Tensor) or not tensor.ndim:
            raise TypeError(
                f"A batch must hold tensors (batch, ...), but {name!r} is {tensor!r:.60}. (A"
                ' tokenizer returns tensors with return_tensors="pt".)'
            )
    if not tensors or len({len(tensor) for tensor in tensors}) > 1:
        raise ValueError(
            f"The tensors must be equally long, but they have {[len(t) for t in tensors]} rows."
        )
    slices = zip(*(tensor.split(micro_batch_size) for tensor in tensors), strict=True)
    return [dict(zip(batch, items, strict=True)) for items in slices] if named else list(slices)


def groups_of(batches: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` batches, one for each optimizer step; the last has what is left.

    Raises:
        ValueError: `size` is below 1.
    """
    _check_size(size)
    batches = iter(batches)
    while group := list(itertools.islice(batches, size)):
        yield group


def count_targets(*micro_batch: Tensor, **named) -> Tensor:
    """Return how many targets count: those in a micro-batch's last tensor that are not -100.

    Raises:
        TypeError: The last tensor is not int64, or the micro-batch is a dict.
    """
    # Of a dict it is not known which targets the loss is a mean of.
    targets = named or micro_batch[-1]
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        raise TypeError(
            f"A micro-batch must end with int64 targets, not {targets!r:.60}: pass count=."
        )
    return (targets != -100).sum()


def accumulate_gradients(
    mean_loss: Callable, micro_batches: Iterable, count: Callable = count_targets
) -> Tensor:
    """Add the gradients of micro-batches to `.grad`, as if they were one large batch.

    Each mean is multiplied by how many targets it is over, and divided by how many there are in
    all. So the gradients are those of the large batch, up to the order of additions, if no row
    depends on another (as in batch norm) and no random numbers are drawn (as by dropout). With
    several processes the counts would have to be summed over all of them.

    Args:
        mean_loss: A model or a function, from a micro-batch to the mean loss over the targets that
            count: a scalar, or an output with a `.loss`. A tuple or list becomes arguments, a dict
            keyword arguments.
        micro_batches: All those of one optimizer step: their targets are counted before the first
            one runs. One without any is left out, since its mean is 0 / 0.
        count: From a micro-batch to how many targets its mean is over. Hugging Face's causal models
            shift the labels: `lambda input_ids, labels: (labels[:, 1:] != -100).sum()`.

    Returns:
        The loss of the large batch, a detached scalar.

    Raises:
        ValueError: No target counts, or a loss is no scalar.
        TypeError: A micro-batch is a dict, and `count` is not given.
        RuntimeError: `optimizer_in_backward` would step after each micro-batch.
    """
    micro_batches = list(micro_batches)
    counts = [int(_call(count, micro_batch)) for micro_batch in micro_batches]
    if sum(counts) == 0 or min(counts) < 0:
        raise ValueError(f"There must be targets that count, but the micro-batches have {counts}.")
    total = 0.0
    for micro_batch, number in zip(micro_batches, counts, strict=True):
        if number == 0:
            continue
        output = _call(mean_loss, micro_batch)
        loss = getattr(output, "loss", output)
        del output  # its logits would stay alive through backward
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"mean_loss must return a scalar, but it returned {loss!r:.80}.")
        if len(micro_batches) > 1:
            _refuse_optimizer_in_backward(loss)
        loss = loss * (number / sum(counts))
        loss.backward()
        total += loss.detach()
    return total


def _refuse_optimizer_in_backward(loss: Tensor) -> None:
    """Raise RuntimeError if backward would step a parameter, before it has stepped any."""
    stepped = _stepped_in_backward()
    if not stepped:
        return
    # The parameters that the loss depends on hang at the ends of its graph.
    nodes = [loss.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in stepped:
            raise RuntimeError(_EXCLUDES_ACCUMULATION)
        nodes += [function for function, _ in node.next_functions]


_EXCLUDES_ACCUMULATION = (
    "A second backward would step the parameters again: an optimizer in backward excludes"
    " accumulation. Use apply_layer_major_micro_batches. (Has the training step ended? Then call"
    " step() first.)"
)


def _call(function: Callable, micro_batch):
    if isinstance(micro_batch, Mapping):
        return function(**micro_batch)
    return function(*(micro_batch if isinstance(micro_batch, tuple | list) else [micro_batch]))


def _check_size(size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"The size must be an int of at least 1, but it is {size!r}.")


# --- The optimizer in backward --------------------------------------------------------------------


def optimizer_in_backward(model: nn.Module, make_optimizer: Callable) -> "OptimizerInBackward":
    """Let backward step each parameter when its gradient is complete, and free the gradient.

        optimizer = optimizer_in_backward(model, make_optimizer)
        loss.backward()  # steps
        optimizer.step()  # ends the training step

    A shared parameter is stepped once. Gradients cannot be accumulated, clipped by their common
    norm or divided by a loss scaler: they are never all there.

    Args:
        model: The model to train.
        make_optimizer: From a list of one parameter to its optimizer:
            `lambda p: torch.optim.AdamW(p, lr=1e-3)`.

    Returns:
        What holds the optimizers: keep it. Its `remove()` takes them away.

    Raises:
        ValueError: The model has nothing to train, a gradient left, or an optimizer in backward
            already.
        TypeError: `model` is no module, or `make_optimizer` returns anything but an optimizer of
            that one parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    taken = _stepped_in_backward()
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient.")
    if left := [name for name, p in named.items() if p.grad is not None]:
        raise ValueError(
            f"{left[0]} has a gradient already: step with it, or set it to None, first."
        )
    if twice := [name for name, p in named.items() if id(p) in taken]:
        raise ValueError(f"{twice[0]} has an optimizer in backward already: remove() it first.")
    optimizers = {name: make_optimizer([parameter]) for name, parameter in named.items()}
    for name, optimizer in optimizers.items():
        groups = getattr(optimizer, "param_groups", ())
        if [p is named[name] for group in groups for p in group["params"]] != [True]:
            raise TypeError(
                f"make_optimizer must return the optimizer of {name}, not {optimizer!r:.80}."
            )
    return OptimizerInBackward(named, optimizers)


class OptimizerInBackward:
    """What `optimizer_in_backward` returns.

    Attributes:
        optimizers: The optimizers by the names of their parameters.
    """

    def __init__(
        self, named: dict[str, nn.Parameter], optimizers: dict[str, torch.optim.Optimizer]
    ):
        self.optimizers = optimizers
        self._stepped = set()
        # A parameter holds its hook where Python's garbage collector does not look. So the hook
        # holds this object weakly: the cycle parameter, hook, optimizer, parameter would never be
        # freed.
        this = weakref.ref(self)

        def hook(name: str, parameter: Tensor) -> None:
            if this() is None:
                raise RuntimeError(
                    "The result of optimizer_in_backward is gone: keep it while you train."
                )
            this()._step(name, parameter)

        self._hooks = []
        try:
            for name, parameter in named.items():
                named_hook = functools.partial(hook, name)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(named_hook))
        except BaseException:
            self.remove()
            raise
        _in_backward.add(self)

    def _step(self, name: str, parameter: Tensor) -> None:
        if name in self._stepped:
            parameter.grad = None
            raise RuntimeError(_EXCLUDES_ACCUMULATION)
        self._stepped.add(name)
        self.optimizers[name].step()
        parameter.grad = None

    def step(self) -> None:
        """End a training step; backward has stepped the parameters.

        Raises:
            RuntimeError: It has not.
        """
        if not self._stepped:
            raise RuntimeError(
                "Backward has stepped no parameter: call loss.backward() before step()."
            )
        self._stepped.clear()

    def zero_grad(self) -> None:
        """Do nothing, since each gradient is gone when its parameter has stepped: so that the loop
        of an ordinary optimizer is left as it is.
        """

    @property
    def param_groups(self) -> list[dict]:
        """The groups of all optimizers, to set a learning rate in each."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def state_dict(self) -> dict:
        """Return the states of the optimizers, by the names of their parameters."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: It is of other parameters.
        """
        if other := sorted(state.keys() ^ self.optimizers.keys()):
            raise ValueError(
                f"The state must be of this model's parameters, but differs in {other}."
            )
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])

    def remove(self) -> None:
        """Take the hooks away: backward leaves gradients again. A second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        _in_backward.discard(self)


# Whose hooks are in place. It holds nothing alive.
_in_backward: "weakref.WeakSet[OptimizerInBackward]" = weakref.WeakSet()


def _stepped_in_backward() -> set[int]:
    """The ids of all parameters that an optimizer in backward steps."""
    groups = [group for optimizer in _in_backward for group in optimizer.param_groups]
    return {id(parameter) for group in groups for parameter in group["params"]}


def clip_gradient_norm(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is `max_norm` at most.

    It is `torch.nn.utils.clip_grad_norm_`, which returns 0 when there are no gradients, and clips
    nothing: an optimizer in backward has used each of them up before the last one was there. Here
    that is an error.

    Args:
        parameters: One parameter, or those whose gradients have a common norm.
        max_norm: The largest norm that is left as it is.

    Returns:
        The norm that it was, a scalar.

    Raises:
        RuntimeError: No parameter has a gradient, or the norm is not finite.
        ValueError: `max_norm` is not a positive number.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not max_norm > 0:
        raise ValueError(f"max_norm must be a positive number, but it is {max_norm!r}.")
    if all(parameter.grad is None for parameter in parameters):
        raise RuntimeError(
            f"None of the {len(parameters)} parameters has a gradient, so there is no norm to clip."
            " An optimizer in backward steps with each gradient before the last one is known: it"
            " excludes clipping by the common norm. Clip each gradient by itself inside it, or"
            " step after backward."
        )
    return nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=True)


# --- Layer by layer, which lets both work together ------------------------------------------------


def in_micro_batches(function: Callable, micro_batch_size: int, /, *args, **kwargs):
    """Return `function(*args, **kwargs)`, computed slice of the batch by slice.

    Each slice is a checkpoint: only the arguments are kept for backward, which runs a slice again
    and passes through it before the next. Dropout draws a mask for each slice, so with the same
    seed the masks can be others than without slices.

    Args:
        function: It returns a tensor (batch, ...), or a tuple of them. Of a loss, return one number
            a row. A result (1, ...) that is the same for all slices is handed on as it is.
        micro_batch_size: Rows of a slice.
        args: The first is a tensor, (batch, ...). It may be given by its name. Further tensors
            (also in tuples and lists) are cut if their first axis is the batch, and given whole to
            each slice if it is 1. So are numbers and None.
        kwargs: As the further arguments.

    Raises:
        ValueError: A tensor does not fit the batch, or fits it in two ways.
        TypeError: Something cannot be cut, such as a cache, or put together.
    """
    _check_size(micro_batch_size)
    if not args:
        first_name = _first_parameter(function)
        args = [kwargs.pop(name) for name in [first_name] if name in kwargs]
    if not args or not isinstance(args[0], Tensor) or args[0].ndim == 0 or len(args[0]) == 0:
        raise ValueError("The first argument must be a tensor (batch, ...) with at least one row.")
    rows = len(args[0])
    firsts = args[0].split(micro_batch_size)
    # With (8, 8, hidden) it is not clear whether the 8 of another tensor is the batch or the
    # sequence.
    ambiguous = args[0].shape[1:2] == (rows,)
    others = [
        _cut(value, rows, micro_batch_size, ambiguous) for value in (*args[1:], *kwargs.values())
    ]
    outputs = []
    for values in zip(firsts, *others, strict=True):
        named = dict(zip(kwargs, values[len(args) :], strict=True))
        call = functools.partial(function, **named)
        outputs.append(checkpoint(call, *values[: len(args)], use_reentrant=False))
    return _join(outputs, [len(first) for first in firsts])


def _first_parameter(function: Callable) -> str | None:
    """The name of a function's first parameter, if it has one."""
    try:
        return next(iter(inspect.signature(function).parameters), None)
    except ValueError:  # some functions of C have no signature
        return None


def _cut(value, rows: int, size: int, ambiguous: bool) -> list:
    if isinstance(value, Tensor) and value.ndim and len(value) != 1:
        if len(value) != rows:
            raise ValueError(
                f"A tensor must be ({rows}, ...) or (1, ...), but it is {tuple(value.shape)}."
            )
        if ambiguous:
            raise ValueError(
                f"Batch and sequence are both {rows}: change one, so that it is clear which."
            )
        return list(value.split(size))
    if type(value) in (tuple, list) and value:
        items = [_cut(item, rows, size, ambiguous) for item in value]
        return [type(value)(slices) for slices in zip(*items, strict=True)]
    if value is None or isinstance(value, Tensor | int | float | str | tuple | list):
        return [value] * len(range(0, rows, size))
    raise TypeError(
        f"A {type(value).__name__} cannot be cut. If it is a cache, pass use_cache=False."
    )


def _join(outputs: list, sizes: list[int]):
    first = outputs[0]
    if type(first) in (tuple, list):
        return type(first)(_join(items, sizes) for items in zip(*outputs, strict=True))
    if first is None:
        return None
    lengths = [len(output) if output.ndim else 0 for output in outputs if torch.is_tensor(output)]
    if lengths == sizes:
        return torch.cat(outputs) if len(outputs) > 1 else first
    # What is the same for all rows, as the bias of positions that a layer of T5 hands on.
    if set(lengths) == {1} and all(torch.equal(first, output) for output in outputs):
        return first
    what = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
    raise TypeError(
        f"The result must be a tensor (batch, ...), here ({sizes[0]}, ...), but it is {what}."
    )


def apply_layer_major_micro_batches(
    model: nn.Module, micro_batch_size: int, blocks: Iterable[nn.Module] | None = None
) -> "Handle":
    """Let the repeated blocks of a model run `in_micro_batches`.

    Call the model and `backward` once, with the whole batch. What is outside the blocks stays
    whole: where the vocabulary is large, call `in_micro_batches` for the output layer and its loss.
    Dropout draws its masks slice by slice: with the same seed they are others than those of a plain
    step (but on a CPU where a block has a single dropout), and so are the gradients.

    Args:
        model: The model whose blocks are changed.
        micro_batch_size: Rows of a micro-batch.
        blocks: The modules, or their class; None takes all lists (ModuleList, ModuleDict,
            Sequential) of modules of one class, leaving out lists inside such modules: those of
            encoder and decoder, or of all stages.

    Returns:
        A handle: `names` of the blocks, and `remove()`, which undoes it.

    Raises:
        TypeError: `model` is no module.
        ValueError: There are no blocks, they are no modules of the model or run in micro-batches
            already, one holds a batch norm, or `micro_batch_size` is below 1.
    """
    _check_size(micro_batch_size)
    found = _find_blocks(model, blocks)
    for name, block in found.items():
        if _is_applied(block, _run_in_micro_batches):
            raise ValueError(f"{name} runs in micro-batches already: remove() that first.")
        if any(isinstance(module, _BATCH_NORMS) for module in block.modules()):
            raise ValueError(
                f"{name} has batch norm, which depends on the whole batch: use another norm."
            )
    handle = Handle()
    with handle.all_or_nothing():
        for name, block in found.items():
            handle.wrap_forward(name, block, _run_in_micro_batches, micro_batch_size)
    return handle


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _run_in_micro_batches(module, forward, micro_batch_size, /, *args, **kwargs):
    name = _first_parameter(module.forward)
    if not args and name in kwargs:
        args = (kwargs.pop(name),)
    return in_micro_batches(forward, micro_batch_size, *args, **kwargs)


# --- pasted from _blocks.py: begin ----------------------------------------------------------------


def _find_blocks(model: nn.Module, blocks=None) -> dict[str, nn.Module]:
    """Return the repeated blocks of a model by their names.

    None takes all lists of blocks. Those of an encoder and a decoder are two, those of a ResNet or
    a U-Net one for each stage.

    Args:
        model: The model.
        blocks: Modules of the model, or their class. None takes all lists (ModuleList, ModuleDict,
            Sequential) of modules of one class that are not inside such a module. A list of one
            module counts if another list has more of its class.

    Raises:
        TypeError: `model` is no module.
        ValueError: There are no such blocks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    names = {module: name for name, module in model.named_modules()}
    if blocks is None:
        blocks = _repeated(list(names))
    elif isinstance(blocks, type):
        blocks = [module for module in names if isinstance(module, blocks)]
    elif not hasattr(blocks, "__iter__"):
        blocks = []
    blocks = list(dict.fromkeys(blocks))
    if not blocks or any(block not in names for block in blocks):
        raise ValueError(
            f"No blocks found in {type(model).__name__}: pass blocks=, a list of its modules or"
            " their class."
        )
    return {names[block]: block for block in blocks}


def _repeated(modules: list[nn.Module]) -> list[nn.Module]:
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    lists = {
        module: list(module.children()) for module in modules if isinstance(module, containers)
    }
    lists = {
        container: blocks
        for container, blocks in lists.items()
        if len({type(block) for block in blocks}) == 1
    }
    # What is inside of a block, as its experts, is a part of it.
    inside = {inner for blocks in lists.values() for block in blocks for inner in block.modules()}
    outer = [blocks for container, blocks in lists.items() if container not in inside]

    # A list of PyTorch's own layers, as of output layers, counts only where there is no other.
    of_blocks = [blocks for blocks in outer if not _is_layer(blocks[0])]
    outer = of_blocks or sorted(outer, key=len)[-1:]

    repeated = {type(blocks[0]) for blocks in outer if len(blocks) > 1}
    repeated = repeated or {type(blocks[0]) for blocks in outer}
    return [block for blocks in outer if type(blocks[0]) in repeated for block in blocks]


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.") and not any(module.children())


# --- pasted from _blocks.py: end ------------------------------------------------------------------


# --- pasted from _patch.py: begin -----------------------------------------------------------------


class Handle:
    """What a technique has changed in a model: `names` says where, `remove()` undoes it.

    As a context manager it removes at the end of the block. It holds the model weakly, and a model
    keeps what was applied to it when its handle is gone.

    `never_used` are the names of what has not run since. A trainer that goes round a model's output
    layer, for example, never calls what was put there. `remove()` warns of it.
    """

    def __init__(self):
        self.names: list[str] = []
        # For each forward that was wrapped, its name, and what the forward itself notes in.
        self._uses: list[tuple[str, dict]] = []
        # By their owners: what was replaced lives no longer than the model that it was replaced in.
        self._replaced = weakref.WeakKeyDictionary()
        self._undo = []

    @property
    def never_used(self) -> list[str]:
        """The names of the modules whose changed forward has not run since."""
        return [name for name, use in self._uses if not use["used"]]

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo all that was applied if an error ends this block."""
        try:
            yield
        except BaseException:
            self._restore()
            raise

    def wrap_forward(
        self,
        name: str,
        module: nn.Module,
        function: Callable,
        *options,
        innermost: bool = False,
        for_backward: bool = False,
    ) -> None:
        """Let `function(module, forward, *options, *args, **kwargs)` run as the module's forward.

        Its `forward` is what ran before, or runs further inside. A copy or a pickle of the model
        takes function and options along: a function that has a name, and plain options.

        Args:
            name: What the module is called in the model.
            innermost: Put it below all that is applied already, for a function that computes what
                the module's own forward does, and never calls it.
            for_backward: It changes only what backward does: a call without gradients is no use of
                it.
        """
        patched = vars(module).get("forward")
        if type(patched).__name__ != "_PatchedForward":
            patched = module.forward = _PatchedForward(module, patched)
        use = {"used": False, "for_backward": for_backward}
        patch = (function, options, use)
        patched.patches.insert(0 if innermost else len(patched.patches), patch)
        self.names.append(name)
        self._uses.append((name, use))
        self._undo.append(functools.partial(_unwrap, weakref.ref(patched), patch))

    def replace(self, name: str, owner: nn.Module, attribute: str, value) -> None:
        """Give an attribute or a submodule of `owner` another value."""
        before = getattr(owner, attribute)
        setattr(owner, attribute, value)
        self.names.append(name)
        self._replaced.setdefault(owner, []).append((name, attribute, before, value))

    def on_remove(self, undo: Callable) -> None:
        """Let `remove()` call `undo()` too: the `remove` of a hook, for example."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Undo what was applied, the last change first, whatever was applied to the model since.

        A second call does nothing.

        Raises:
            RuntimeError: Something else has replaced an attribute since. Nothing is undone then.

        Warns:
            UserWarning: Some of it was never used.
        """
        was_applied = bool(self._undo)
        self._restore()
        if was_applied:
            self._warn_of_unused()

    def _warn_of_unused(self) -> None:
        names = [name or "the model" for name in self.never_used]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        if names:
            warnings.warn(
                f"Never used: {', '.join(names[:4])}{more}. It was applied there, and nothing has"
                " called it since. If the model ran, its caller went round it.",
                stacklevel=3,
            )

    def _restore(self) -> None:
        replaced = [
            (owner, *entry) for owner, entries in self._replaced.items() for entry in entries
        ]
        for owner, name, attribute, _, value in replaced:
            if getattr(owner, attribute, None) is not value:
                raise RuntimeError(
                    f"Something has replaced {attribute!r} of {name or 'the model'} since this was"
                    " applied: undo that first, then call remove() again."
                )
        for owner, _, attribute, before, _ in replaced:
            setattr(owner, attribute, before)
        self._replaced.clear()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, kind, *_) -> None:
        was_applied = bool(self._undo)
        self._restore()
        if was_applied and kind is None:  # beside an error it would be one line too many
            self._warn_of_unused()

    def __repr__(self) -> str:
        unused = f", never_used={self.never_used}" if self.never_used else ""
        return f"{type(self).__name__}(names={self.names}{unused})"


class _PatchedForward:
    """The `forward` of a module that something is applied to: each patch around the one before.

    It holds the module weakly: otherwise a deleted model would be a cycle, and stay in memory until
    the garbage collector came. In a copy of the model it is the copy's.
    """

    # Slots, and so no `__dict__`: `functools.wraps` would copy that to a forward put over this one.
    __slots__ = ("__weakref__", "before", "module", "patches")

    def __init__(self, module: nn.Module, before: Callable | None, patches=()):
        self.module = weakref.ref(module)
        self.before = before  # a forward that the instance had, from somebody else
        self.patches = list(patches)

    def unpatched(self) -> Callable:
        module = self.module()
        if module is None:
            raise ReferenceError("The model is gone that this forward belongs to: keep the model.")
        return self.before or functools.partial(type(module).forward, module)

    def __call__(self, *args, **kwargs):
        forward = self.unpatched()
        for function, options, use in self.patches:
            forward = functools.partial(function, self.module(), forward, *options)
            if torch.is_grad_enabled() or not use["for_backward"]:
                use["used"] = True
        return forward(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.unpatched())

    def __reduce__(self):
        return type(self), (self.module(), self.before, self.patches)


def _is_applied(module: nn.Module, function: Callable) -> bool:
    """Whether `function` is among the patches of a module's forward."""
    patches = getattr(vars(module).get("forward"), "patches", ())
    return any(patch[0] is function for patch in patches)


def _unwrap(reference: weakref.ref, patch: tuple) -> None:
    patched = reference()
    if patched is None:
        return
    patched.patches[:] = [other for other in patched.patches if other is not patch]
    module = patched.module()
    if module is None or patched.patches or vars(module).get("forward") is not patched:
        return  # a forward that somebody has put over it stays, and what is below lets all through
    del module.forward
    if patched.before is not None:
        module.forward = patched.before


# --- pasted from _patch.py: end -------------------------------------------------------------------
