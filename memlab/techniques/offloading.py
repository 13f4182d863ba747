"""Offloading: what is not needed now waits on the far side, and comes back when it is.

The far side of a GPU is the host's pinned memory; that of a CPU is a memory-mapped file. What can
wait there:
- activations between forward and backward (`offload_activations`),
- optimizer state between steps (`offload_optimizer_state`),
- the parameters of blocks that do not run, and their gradients (`stream_parameters`).

The three compose. Nothing is computed twice; the price is traffic. On a GPU
activations travel on a stream of their own, beside the computation. On a CPU nothing hides the
copies.

Sources: Rhu et al., "vDNN" (2016), arXiv:1602.08124; Ren et al., "ZeRO-Offload" (2021),
arXiv:2101.06840.
"""

import contextlib
import functools
import inspect
import os
import tempfile
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

# --- The far side ---------------------------------------------------------------------------------


def far_like(
    tensor: Tensor,
    directory: str | os.PathLike | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return a tensor of this tensor's shape, strides and dtype on the far side, not initialized.

    For a CUDA tensor that is pinned memory, for a CPU tensor a mapped file. The file has no name:
    it ends with the tensor, or with the process.

    Args:
        tensor: Of any shape.
        directory: Where the file goes; None takes the place of temporary files, which on some
            systems is itself in memory.
        device: Whose far side is meant, if not that of the tensor's own device: for a tensor on the
            meta device.

    Raises:
        ValueError: The device is neither the CPU nor CUDA.
        OSError: The file cannot be made.
    """
    computing_device = torch.device(device or tensor.device)
    if computing_device.type == "cuda":
        return torch.empty_like(tensor, device="cpu", pin_memory=True)
    if computing_device.type != "cpu":
        raise ValueError(
            f"Offloading knows CPU and CUDA tensors: this one is on {computing_device}."
        )
    size = max(1, tensor.nbytes)
    strides = torch.empty_like(tensor, device="meta").stride()
    handle, path = tempfile.mkstemp(prefix="offloaded-", dir=directory)
    try:
        # To write to a map beyond the end of the disk would end the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
    except OSError as error:
        raise OSError(
            f"No room for a file of {size:,} bytes: pass another directory= ({error})."
        ) from error
    finally:
        os.close(handle)
        os.unlink(path)
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(storage, 0, tensor.size(), strides)


def far_zeros(*size, dtype: torch.dtype | None = None, device=None, directory=None) -> Tensor:
    """Return `torch.zeros(*size, dtype=dtype)` on the far side, for what is far from its birth.

    Args:
        size: The shape.
        dtype: None takes PyTorch's default type.
        device: Whose far side is meant; None takes PyTorch's default device.
        directory: Where a file goes, see `far_like`.

    Raises:
        ValueError: The device is neither the CPU nor CUDA.
        OSError: The file cannot be made.
    """
    like = torch.empty(*size, dtype=dtype, device="meta")
    return far_like(like, directory, device=device or torch.get_default_device()).zero_()


@functools.cache
def _copy_stream(device: torch.device, kind: type) -> torch.cuda.Stream:
    return kind(device)  # one for each device


def _copy(target: Tensor, source: Tensor, device: torch.device) -> torch.cuda.Event | None:
    """Copy there or back. On a GPU that runs beside the computation; the result tells when it is
    done.
    """
    if device.type == "cpu":
        target.copy_(source)
        return None
    stream = _copy_stream(device, torch.cuda.Stream)
    # After what computes the source, and after whatever had the target's memory before.
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    return stream.record_event()


def _is_far(tensor: Tensor) -> bool:
    return tensor.is_pinned() or tensor.untyped_storage().filename is not None


def _is_plain(tensor) -> bool:
    """Whether a tensor is its storage and a way to look at it, and nothing else."""
    kinds = (Tensor, nn.Parameter, FakeTensor)  # a fake one has its storage, without the bytes
    plain = type(tensor) in kinds and tensor.layout is torch.strided
    return plain and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


# --- Activations ----------------------------------------------------------------------------------


class offload_activations(saved_tensors_hooks):  # noqa: N801 - read as a verb
    """Inside `with`, what autograd saves for backward goes far; backward brings it near again.

        offload = offload_activations(model)  # once: it keeps its room there from step to step
        for tokens, targets in batches:
            with offload:
                loss = model(tokens, targets)
            loss.backward()

    A storage moves once, however many saved tensors are views of it, and is near again while one is
    in use. Gradients are those of a plain step, bit for bit. Only the innermost hooks see a saved
    tensor: of a checkpointed block these see the inputs. In backward, a saved tensor that was
    changed in place is a RuntimeError, if what was saved is lost.

    Args:
        stays: Models and tensors that are near anyway (the model, the batch): they do not move.
        min_bytes: Smaller storages do not move either.
        ahead: On a GPU, how many storages may be under way: near until they have left, and fetched
            early.
        directory: Where the files go that are the far side of a CPU, see `far_like`.

    Attributes:
        moved_bytes: What the last `with` moved, in bytes.

    Raises:
        TypeError: Something else is in `stays`.
        ValueError: `min_bytes` or `ahead` is below 0.
    """

    def __init__(
        self,
        *stays: nn.Module | Tensor,
        min_bytes: int = 2**20,
        ahead: int = 2,
        directory: str | os.PathLike | None = None,
    ):
        if not all(isinstance(thing, nn.Module | Tensor) for thing in stays):
            raise TypeError(f"What stays near must be models and tensors, but it is {stays!r:.80}.")
        if not (
            isinstance(min_bytes, int) and isinstance(ahead, int) and min(min_bytes, ahead) >= 0
        ):
            raise ValueError(
                f"min_bytes and ahead must be 0 or more, but they are {min_bytes} and {ahead}."
            )
        super().__init__(self._pack, self._unpack)
        # Weakly: a loss's graph holds these hooks.
        self._stays = [weakref.ref(thing) for thing in stays]
        self._min_bytes = min_bytes
        self._ahead = ahead
        self._directory = directory
        # What is free on the far side, by bytes and device.
        self._room: dict[tuple, list[Tensor]] = {}
        # On a GPU: copies that the computation has not waited for.
        self._leaving: deque = deque()
        self._last = lambda: None
        self.moved_bytes = 0

    def __enter__(self):
        things = [thing for reference in self._stays if (thing := reference()) is not None]
        for module in [thing for thing in things if isinstance(thing, nn.Module)]:
            things += [*module.parameters(), *module.buffers()]
        self._near = {thing.untyped_storage().data_ptr() for thing in things if _is_plain(thing)}
        # For each storage its version and, weakly, what was moved.
        self._moved = weakref.WeakKeyDictionary()
        self.moved_bytes = 0
        super().__enter__()
        return self

    def __exit__(self, *exception):
        self._let_leave(0)
        super().__exit__(*exception)

    def _pack(self, tensor: Tensor) -> tuple:
        """In forward, autograd calls this for each tensor that it is to save."""
        storage = tensor.untyped_storage() if _is_plain(tensor) else None
        parameter = _PARAMETER_OF.get(storage) if storage else None
        stays = (
            not storage or storage.nbytes() < self._min_bytes or storage.data_ptr() in self._near
        )
        if stays and parameter is None:
            return None, tensor, tensor._version
        version, moved = self._moved.get(storage, (None, lambda: None))
        moved = moved() if version == tensor._version else None
        if moved is None:
            if parameter is not None:
                moved = _Moved(parameter, tensor.device)
            else:
                moved = self._move(tensor, storage)
            moved.before = self._last
            self._last = weakref.ref(moved)
            self._moved[storage] = tensor._version, self._last
        return moved, tensor.dtype, (tensor.storage_offset(), tensor.size(), tensor.stride())

    def _move(self, tensor: Tensor, storage: torch.UntypedStorage) -> "_Moved":
        near = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        room = self._room.setdefault((storage.nbytes(), tensor.device), [])
        moved = _Moved(room.pop() if room else far_like(near, self._directory), tensor.device, room)
        self.moved_bytes += storage.nbytes()
        if (event := _copy(moved.far, near, tensor.device)) is not None:
            self._leaving.append((event, tensor, tensor._version, moved))
            self._let_leave(self._ahead)
        return moved

    def _let_leave(self, count: int) -> None:
        """Hold at most so many storages whose copies may not be done. The GPU waits,
        not the host.
        """
        while len(self._leaving) > count:
            event, tensor, version, moved = self._leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(event)
            # Changed in place, perhaps before the copy was done.
            moved.lost = tensor._version != version

    def _unpack(self, packed: tuple) -> Tensor:
        """In backward, autograd calls this for each tensor that it needs."""
        if packed[0] is None:
            _, tensor, version = packed
            # PyTorch does not look for changes itself once there are hooks.
            return tensor if tensor._version == version else _refuse(tensor)
        moved, dtype, place = packed
        storage = moved.bring()
        for _ in range(self._ahead if storage.is_cuda else 0):
            if (moved := moved.before()) is None:
                break
            moved.start()
        return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *place)


class _Moved:
    """What is far: the bytes of a saved storage, or a streamed parameter. Autograd's graph holds
    it.
    """

    lost = False
    waiting: torch.UntypedStorage | None = None
    arrived: torch.cuda.Event | None = None

    def __init__(self, far: Tensor, device: torch.device, room: list | None = None):
        self.far = far.detach()
        self.version = far._version
        self.device = device
        self.room = room
        # Weakly: the near storage, and what was moved before this.
        self.near = self.before = lambda: None

    def start(self) -> None:
        if self.lost or (self.room is None and self.far._version != self.version):
            _refuse(self.far)
        if self.near() is None:
            near = torch.empty_like(self.far, device=self.device, pin_memory=False)
            self.arrived = _copy(near, self.far, self.device)
            self.waiting = near.untyped_storage()
            self.near = weakref.ref(self.waiting)

    def bring(self) -> torch.UntypedStorage:
        self.start()
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        near = self.near()
        self.waiting = None  # from here on only the tensors in it hold it
        return near

    def __del__(self):
        # Fetched early and never used: its memory is free when the copy is done.
        if self.waiting is not None:
            self.bring()
        if self.room is not None:
            self.room.append(self.far)


def _refuse(saved: Tensor):
    what = f"A saved tensor of {saved.nbytes:,} bytes was changed in place before backward was over"
    raise RuntimeError(
        f"{what}, and what was saved is lost. Leave it, or step the optimizer after backward."
    )


# --- The optimizer's state ------------------------------------------------------------------------


def offload_optimizer_state(
    optimizer: torch.optim.Optimizer,
    *,
    min_bytes: int = 2**16,
    directory: str | os.PathLike | None = None,
) -> "Handle":
    """Keep an optimizer's state far; its `step()` brings one parameter's after the other near.

    Weights are those of a plain step, bit for bit. Each byte of state travels twice a step, and
    that is not hidden. `state_dict` and learning-rate schedulers work as before; hooks on the step
    run once a parameter.

    Args:
        optimizer: Any but LBFGS, which updates all parameters at once.
        min_bytes: Smaller state stays near, as do tensor subclasses.
        directory: Where the files go that are the far side of a CPU, see `far_like`.

    Returns:
        A handle: `names`, here the optimizer's class, and `remove()`, which brings all state near
        again.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: It is LBFGS, or its state is offloaded already.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but it is {optimizer!r:.80}.")
    previous = vars(optimizer).get("step")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS updates all parameters at once: its state cannot come one by one.")
    # A scheduler that has wrapped our step has copied its attributes.
    if getattr(previous, "offloading", {"on": False})["on"]:
        raise ValueError("The state of this optimizer is offloaded already: remove() that first.")
    reference = weakref.ref(optimizer)
    plain_step = previous or type(optimizer).step
    offloading = {"on": True}

    def step(_, closure=None):
        optimizer = reference()
        if offloading["on"]:
            return _step_one_by_one(optimizer, previous, closure, min_bytes, directory)
        return previous(closure) if previous else plain_step(optimizer, closure)

    functools.update_wrapper(step, plain_step)
    step.offloading = offloading
    # As a method (a learning-rate scheduler looks for its `__func__`) that holds the optimizer
    # weakly.
    optimizer.step = MethodType(step, weakref.proxy(optimizer))
    handle = Handle()
    handle.names.append(type(optimizer).__name__)
    handle.on_remove(functools.partial(_stop_offloading, reference, step, previous, offloading))
    return handle


def _step_one_by_one(optimizer, previous, closure, min_bytes: int, directory):
    """Let the optimizer step one parameter after the other, as if there were no others."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    groups = optimizer.param_groups
    for group, parameter in [(g, p) for g in groups for p in g["params"] if p.grad is not None]:
        parameters = group["params"]
        homes = _movable(optimizer, parameter, min_bytes)
        for key, far in homes.items():
            near = far.to(parameter.device, copy=True, non_blocking=True)
            optimizer.state[parameter][key] = near
        optimizer.param_groups = [group]
        group["params"] = [parameter]
        try:
            previous() if previous else type(optimizer).step(optimizer)
        finally:
            optimizer.param_groups = groups
            group["params"] = parameters
            for key, near in _movable(optimizer, parameter, min_bytes).items():
                # Near if it was born now, or loaded from a state_dict.
                home = homes.get(key, near)
                home = home if _is_far(home) else far_like(near, directory)
                optimizer.state[parameter][key] = home.copy_(near, non_blocking=True)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the host may read the state now, as `state_dict` does
    return loss


def _movable(optimizer, parameter: Tensor, min_bytes: int) -> dict[str, Tensor]:
    """The state of a parameter that goes far, by its key."""
    if parameter.is_pinned():  # streamed, beside a GPU: its state is born on the host
        return {}
    state = optimizer.state.get(parameter, {})
    return {
        key: value for key, value in state.items() if _is_plain(value) and value.nbytes >= min_bytes
    }


def _stop_offloading(reference: weakref.ref, step, previous, offloading: dict) -> None:
    """Bring the state near, and let `step` be the optimizer's own. What has wrapped it since, as a
    scheduler does, stays, and calls the optimizer's own step through it."""
    offloading["on"] = False
    optimizer = reference()
    if optimizer is None:
        return
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if _is_plain(value) and _is_far(value):
                state[key] = value.to(parameter.device, copy=True)
    if getattr(vars(optimizer).get("step"), "__func__", None) is step:
        del optimizer.step
        if previous is not None:
            optimizer.step = previous


# --- Parameters -----------------------------------------------------------------------------------

# The parameter of each near copy, by the copy's storage: it need not move when autograd saves it.
_PARAMETER_OF = weakref.WeakKeyDictionary()


def stream_parameters(
    blocks: Iterable[nn.Module],
    *,
    min_bytes: int = 2**16,
    device: torch.device | str | None = None,
    directory: str | os.PathLike | None = None,
) -> "Handle":
    """Keep the parameters of blocks and their gradients far; the block that runs has copies near.

    They stay the objects they were, and an optimizer steps them where they are: in the file, or
    beside a GPU on the host, unless it brings them near itself. Frozen ones, such as the base of a
    LoRA, may be among them. Autograd saves the near copies, so
    this saves memory in training only inside `offload_activations`, or if gradient checkpointing is
    applied to the blocks after it. A model with streamed parameters cannot be copied or pickled
    (TypeError): use its `state_dict`.

    Args:
        blocks: Modules such as `model.blocks`, which share no parameters. Stream them before the
            first step.
        min_bytes: Smaller parameters stay near.
        device: Where the blocks run, if their parameters are not there: they are on the host, as
            a model is before `.to("cuda")`, or far already (made by `far_like`).
        directory: Where the files go that are the far side of a CPU, see `far_like`.

    Returns:
        A handle: `names`, the blocks' places in `blocks`, and `remove()`, which brings near again
        what was near before. Beside a GPU an optimizer's state stays on the host then: load its
        `state_dict` into it again.

    Raises:
        TypeError: `blocks` are no modules.
        ValueError: A block has nothing to stream, has gradients, or its `forward` is replaced
            already.
        OSError: There is no room on the far side. All parameters are near again then.
    """
    blocks = list(blocks) if isinstance(blocks, Iterable) else [None]
    if not all(isinstance(block, nn.Module) for block in blocks):
        raise TypeError("blocks must be a list of torch.nn.Module, such as model.blocks.")
    far = [_Far(block, min_bytes, device, directory) for block in blocks]  # looks, changes nothing
    handle = Handle()
    with handle.all_or_nothing():
        for number, (block, parameters) in enumerate(zip(blocks, far, strict=True)):
            handle.on_remove(parameters.come_back)
            parameters.leave()
            handle.wrap_forward(str(number), block, _run_with_near_copies, parameters)
    return handle


class _Far:
    """The parameters of a block that are far, which it holds weakly: a block holds this."""

    def __init__(self, block: nn.Module, min_bytes: int, device, directory):
        streamed = [p for p in block.parameters() if p.nbytes >= min_bytes]
        if not streamed:
            raise ValueError(
                f"{type(block).__name__} has no parameter of {min_bytes:,} bytes or more."
            )
        if "forward" in vars(block) or any(p.grad is not None for p in streamed):
            raise ValueError(
                "Stream parameters once: before checkpointing, and before there are gradients."
            )
        self.device = torch.device(device or streamed[0].device)
        self.directory = directory
        self.ids = {id(parameter) for parameter in streamed}
        self.parameters = [weakref.ref(parameter) for parameter in streamed]
        self.came = []  # those that were near
        self.hooks = []

    def leave(self) -> None:
        for reference in self.parameters:
            parameter = reference()
            if not _is_far(parameter):
                far = far_like(parameter, self.directory, device=self.device)
                parameter.data = far.copy_(parameter.detach())
                self.came.append(reference)
            # For a GPU `_Near` does it, and what is frozen gets no gradient.
            if self.device.type == "cpu" and parameter.requires_grad:
                hook = functools.partial(_to_far, directory=self.directory)
                self.hooks.append(parameter.register_hook(hook))

    def come_back(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for reference in self.came:
            parameter = reference()
            if parameter is None:
                continue
            gradient = parameter.grad
            parameter.grad = None  # it has to be where its parameter is
            parameter.data = parameter.detach().to(self.device, copy=True)
            if gradient is not None:
                parameter.grad = gradient.to(self.device, copy=True)

    def __reduce__(self):
        raise TypeError(
            "A model with streamed parameters cannot be copied or pickled: use its state_dict."
        )


def _to_far(gradient: Tensor, directory=None) -> Tensor:
    return far_like(gradient, directory).copy_(gradient)


class _Near(torch.autograd.Function):
    """A GPU's copy of a parameter of the host. Its gradient goes to pinned memory, not to any of
    the host's.
    """

    @staticmethod
    def forward(ctx, parameter, device):
        return parameter.to(device, non_blocking=True)

    @staticmethod
    def backward(ctx, gradient):
        return _to_far(gradient), None


def _run_with_near_copies(block, forward, far: _Far, /, *args, **kwargs):
    on_gpu = far.device.type == "cuda"
    near = {}
    for parameter in block.parameters():
        if id(parameter) in far.ids:
            copy = _Near.apply(parameter, far.device) if on_gpu else parameter.to("cpu", copy=True)
            near[parameter] = copy
            _PARAMETER_OF[copy.untyped_storage()] = parameter
    places = [
        (vars(module), name, near[parameter])
        for module in block.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter in near
    ]
    try:
        for attributes, name, copy in places:
            attributes[name] = copy  # found before the parameter of this name
        return forward(*args, **kwargs)
    finally:
        for attributes, name, _ in places:
            attributes.pop(name, None)


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
