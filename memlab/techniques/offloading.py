"""Offloading: what is not needed now waits on the far side, and comes back when it is.

The far side of a GPU is the host's pinned memory; that of a CPU is a memory-mapped file. What can
wait there:
activations between forward and backward (`offload_activations`), optimizer state between steps
(`offload_optimizer_state`), the parameters of blocks that do not run, and their gradients
(`stream_parameters`). The three compose. Nothing is computed twice; the price is traffic. On a GPU
activations travel on a stream of their own, beside the computation. On a CPU nothing hides the
copies.

Sources: Rhu et al., "vDNN" (2016), arXiv:1602.08124; Ren et al., "ZeRO-Offload" (2021),
arXiv:2101.06840.
"""

import functools
import os
import tempfile
import weakref
from collections import deque
from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def far_like(tensor: Tensor, directory: str | os.PathLike | None = None, *, device=None) -> Tensor:
    """Return a tensor of this tensor's shape, strides and dtype on the far side, not initialized.

    For a CUDA tensor that is pinned memory; for a CPU tensor a mapped file in `directory` (by
    default where temporary files go: on some systems that is itself in memory). The file has no
    name: it ends with the tensor, or with the process. `device` says whose far side is meant, if
    not that of the tensor's own: of a tensor on the meta device. Raises ValueError for other
    devices, OSError when the file cannot be made.
    """
    near = torch.device(device or tensor.device)
    if near.type == "cuda":
        return torch.empty_like(tensor, device="cpu", pin_memory=True)
    if near.type != "cpu":
        raise ValueError(f"Offloading knows CPU and CUDA tensors: this one is on {near}.")
    size, strides = max(1, tensor.nbytes), torch.empty_like(tensor, device="meta").stride()
    handle, path = tempfile.mkstemp(prefix="offloaded-", dir=directory)
    try:
        if hasattr(
            os, "posix_fallocate"
        ):  # to write to a map beyond the end of the disk ends the process
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
    """Return `torch.zeros(*size, dtype=dtype)` on the far side of a device, for what is far from
    its birth.
    """
    like = torch.empty(*size, dtype=dtype, device="meta")
    return far_like(like, directory, device=device or torch.get_default_device()).zero_()


_copy_stream = functools.cache(torch.cuda.Stream)  # one for each device


def _copy(target: Tensor, source: Tensor, near: torch.device) -> torch.cuda.Event | None:
    """Copy there or back. On a GPU that runs beside the computation; the result tells when it is
    done.
    """
    if near.type == "cpu":
        target.copy_(source)
        return None
    stream = _copy_stream(near)
    # After what computes the source, and after whatever had the target's memory before.
    stream.wait_stream(torch.cuda.current_stream(near))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    return stream.record_event()


def _is_far(tensor: Tensor) -> bool:
    return tensor.is_pinned() or tensor.untyped_storage().filename is not None


def _is_plain(tensor) -> bool:  # its storage and a way to look at it, and nothing else
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


class offload_activations(saved_tensors_hooks):  # noqa: N801 - read as a verb
    """Inside `with`, what autograd saves for backward goes to the far side; backward brings it near
    again.

    >>> offload = offload_activations(model)  # once: it keeps its room on the far side from step to
    step >>> with offload:
    ...     loss = model(tokens, targets)
    >>> loss.backward()

    A storage moves once, however many saved tensors are views of it, and is near again while one is
    in use. Gradients are those of a plain step, bit for bit. Only the innermost hooks see a saved
    tensor: of a checkpointed block these see the inputs. `moved_bytes` counts what the last `with`
    moved.

    stays: models and tensors that are near anyway (the model, the batch): they do not move.
    min_bytes: smaller storages do not move either. ahead: on a GPU, how many storages may be under
    way: near until they have left, and fetched early.

    Raises TypeError for other things in `stays`, ValueError for numbers below 0, and in backward
    RuntimeError for a saved tensor that was changed in place, if what was saved is lost.
    """

    def __init__(
        self, *stays: nn.Module | Tensor, min_bytes: int = 2**20, ahead: int = 2, directory=None
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
        self._stays = [
            weakref.ref(thing) for thing in stays
        ]  # weakly: a loss's graph holds these hooks
        self._min_bytes, self._ahead, self._directory = min_bytes, ahead, directory
        self._room: dict[tuple, list[Tensor]] = {}  # free, on the far side: by bytes and device
        self._leaving: deque = deque()  # on a GPU: copies that the computation has not waited for
        self._last, self.moved_bytes = (lambda: None), 0

    def __enter__(self):
        near = [thing for reference in self._stays if (thing := reference()) is not None]
        for module in [thing for thing in near if isinstance(thing, nn.Module)]:
            near += [*module.parameters(), *module.buffers()]
        self._near = {thing.untyped_storage().data_ptr() for thing in near if _is_plain(thing)}
        self._moved = (
            weakref.WeakKeyDictionary()
        )  # storage -> its version and, weakly, what was moved
        self.moved_bytes = 0
        super().__enter__()
        return self

    def __exit__(self, *exception):
        self._let_leave(0)
        super().__exit__(*exception)

    def _pack(
        self, tensor: Tensor
    ):  # autograd calls it in forward, for each tensor that it is to save
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
            moved = (
                _Moved(parameter, tensor.device)
                if parameter is not None
                else self._move(tensor, storage)
            )
            moved.before, self._last = self._last, weakref.ref(moved)
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
            moved.lost = (
                tensor._version != version
            )  # changed in place, perhaps before the copy was done

    def _unpack(
        self, packed
    ) -> Tensor:  # autograd calls it in backward, for each tensor that it needs
        moved, what, where = packed
        if moved is None:  # PyTorch does not look for changes itself once there are hooks
            return what if what._version == where else _refuse(what)
        storage = moved.bring()
        for _ in range(self._ahead if storage.is_cuda else 0):
            if (moved := moved.before()) is None:
                break
            moved.start()
        return torch.empty(0, dtype=what, device=storage.device).set_(storage, *where)


class _Moved:
    """What is far: the bytes of a saved storage, or a streamed parameter. Autograd's graph holds
    it.
    """

    lost, waiting, arrived = False, None, None

    def __init__(self, far: Tensor, device: torch.device, room: list | None = None):
        self.far, self.device, self.room, self.version = far.detach(), device, room, far._version
        self.near = self.before = lambda: (
            None
        )  # weakly: the near storage, what was moved before this

    def start(self) -> None:
        if self.lost or (self.room is None and self.far._version != self.version):
            _refuse(self.far)
        if self.near() is None:
            near = torch.empty_like(self.far, device=self.device, pin_memory=False)
            self.arrived, self.waiting = _copy(near, self.far, self.device), near.untyped_storage()
            self.near = weakref.ref(self.waiting)

    def bring(self) -> torch.UntypedStorage:
        self.start()
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        near, self.waiting = self.near(), None  # from here on only the tensors in it hold it
        return near

    def __del__(self):
        if (
            self.waiting is not None
        ):  # fetched early and never used: its memory is free when the copy is done
            self.bring()
        if self.room is not None:
            self.room.append(self.far)


def _refuse(saved: Tensor):
    what = f"A saved tensor of {saved.nbytes:,} bytes was changed in place before backward was over"
    raise RuntimeError(
        f"{what}, and what was saved is lost. Leave it, or step the optimizer after backward."
    )


def offload_optimizer_state(
    optimizer: torch.optim.Optimizer, *, min_bytes: int = 2**16, directory=None
):
    """Keep an optimizer's state far; its `step()` brings that of one parameter after the other
    near.

    Weights are those of a plain step, bit for bit. Each byte of state travels twice a step, and
    that is not hidden. `state_dict` and learning-rate schedulers work as before; hooks on the step
    run once a parameter.

    min_bytes: smaller state stays near, as do tensor subclasses.

    Raises TypeError for what is no optimizer, ValueError for LBFGS and for a second application.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but it is {optimizer!r:.80}.")
    previous, reference = vars(optimizer).get("step"), weakref.ref(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS) or hasattr(previous, "offloads_state"):
        raise ValueError(
            "LBFGS updates all parameters at once; for others, offload the state once only."
        )

    def step(_, closure=None):
        optimizer, loss = reference(), None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = optimizer.param_groups
        for group, parameter in [(g, p) for g in groups for p in g["params"] if p.grad is not None]:
            parameters, homes = (
                group["params"],
                movable(optimizer.state.get(parameter, {}), parameter),
            )
            for key, far in homes.items():
                optimizer.state[parameter][key] = far.to(
                    parameter.device, copy=True, non_blocking=True
                )
            optimizer.param_groups, group["params"] = [group], [parameter]
            try:
                previous() if previous else type(optimizer).step(optimizer)
            finally:
                optimizer.param_groups, group["params"] = groups, parameters
                for key, near in movable(optimizer.state.get(parameter, {}), parameter).items():
                    home = homes.get(
                        key, near
                    )  # near if it was born now, or loaded from a state_dict
                    home = home if _is_far(home) else far_like(near, directory)
                    optimizer.state[parameter][key] = home.copy_(near, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the host may read the state now, as `state_dict` does
        return loss

    def movable(state: dict, parameter: Tensor) -> dict[str, Tensor]:
        large = {
            key: value
            for key, value in state.items()
            if _is_plain(value) and value.nbytes >= min_bytes
        }
        return (
            {} if parameter.is_pinned() else large
        )  # streamed, beside a GPU: its state is born on the host

    functools.update_wrapper(step, previous or type(optimizer).step)
    step.offloads_state = True
    # As a method (a learning-rate scheduler looks for its `__func__`) that holds the optimizer
    # weakly.
    optimizer.step = MethodType(step, weakref.proxy(optimizer))


_PARAMETER_OF = (
    weakref.WeakKeyDictionary()
)  # by the storage of a near copy, which need not move when saved


def stream_parameters(blocks, *, min_bytes: int = 2**16, device=None, directory=None) -> None:
    """Keep the parameters of blocks and their gradients far; the block that runs has copies near.

    They stay the objects they were, and an optimizer steps them where they are: in the file, or
    beside a GPU on the host, unless it brings them near itself. Autograd saves the near copies, so
    this saves memory in training only inside `offload_activations`, or if gradient checkpointing is
    applied to the blocks after it.

    blocks: modules such as `model.blocks`, which share no parameters. Stream them before the first
    step. min_bytes: smaller parameters stay near. device: where the blocks run, if their parameters
    are far already (made by `far_like`).

    Raises ValueError for a block with nothing to stream, with gradients, or with a replaced
    `forward`.
    """
    for block in list(blocks):
        streamed = [parameter for parameter in block.parameters() if parameter.nbytes >= min_bytes]
        if not streamed:
            raise ValueError(
                f"{type(block).__name__} has no parameter of {min_bytes:,} bytes or more."
            )
        if "forward" in vars(block) or any(p.grad is not None for p in streamed):
            raise ValueError(
                "Stream parameters once: before checkpointing, and before there are gradients."
            )
        near = torch.device(device or streamed[0].device)
        block.forward = _StreamedForward(block, {id(parameter) for parameter in streamed}, near)
        for parameter in streamed:
            if not _is_far(parameter):
                parameter.data = far_like(parameter, directory).copy_(parameter.detach())
            if near.type == "cpu":  # for a GPU `_Near` does it
                parameter.register_hook(
                    lambda gradient: far_like(gradient, directory).copy_(gradient)
                )


class _Near(torch.autograd.Function):
    """A GPU's copy of a parameter of the host. Its gradient goes to pinned memory, not to any of
    the host's.
    """

    @staticmethod
    def forward(ctx, parameter, device):
        return parameter.to(device, non_blocking=True)

    @staticmethod
    def backward(ctx, gradient):
        return far_like(gradient).copy_(gradient), None


class _StreamedForward:  # it holds the block weakly, for the block holds it
    def __init__(self, block: nn.Module, streamed: set[int], device: torch.device):
        self.block, self.streamed, self.device = weakref.ref(block), streamed, device

    def __call__(self, *args, **kwargs):
        block, on_gpu = self.block(), self.device.type == "cuda"
        streamed = [parameter for parameter in block.parameters() if id(parameter) in self.streamed]
        near = {
            p: _Near.apply(p, self.device) if on_gpu else p.to("cpu", copy=True) for p in streamed
        }
        _PARAMETER_OF.update(
            {copy.untyped_storage(): parameter for parameter, copy in near.items()}
        )
        own = [
            (vars(m), *item) for m in block.modules() for item in m.named_parameters(recurse=False)
        ]
        try:
            for attributes, name, parameter in own:
                if parameter in near:
                    attributes[name] = near[parameter]  # found before the parameter of this name
            return type(block).forward(block, *args, **kwargs)
        finally:
            for attributes, name, _ in own:
                attributes.pop(name, None)

    def __reduce__(self):
        raise TypeError(
            "A model with streamed parameters cannot be copied or pickled: use its state_dict."
        )
