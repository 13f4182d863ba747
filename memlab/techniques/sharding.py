"""Sharding: several processes train one model on different data, and none of them keeps all of its
state.

Plain data parallel training holds everything N times: with Adam in FP32 16 bytes a parameter on
each of N ranks. Each stage divides one thing more by N, and changes no result:

    stage  divided by N                      bytes a parameter, FP32 Adam     sent, beside stage 0
    0      nothing                           16                               1
    1      optimizer state                   8 + 8/N                          1
    2      gradients too                     4 + 12/N                         1
    3      parameters too                    16/N, and one block whole        1.5

Activations are divided by none of them. `shard_training` does it to a model from outside, parameter
by parameter: few bytes, many small messages. `run_ranks` starts the processes, and ends them.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(2020), arXiv:1910.02054. In production use torch.distributed.fsdp.fully_shard, which also hides the
messages.
"""

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

# PyTorch 2.13 renamed both, and the old names warn there.
_NEW = hasattr(dist, "all_gather_single")
_ALL_GATHER = "all_gather_single" if _NEW else "all_gather_into_tensor"
_REDUCE_SCATTER = "reduce_scatter_single" if _NEW else "reduce_scatter_tensor"

# Optimizers that look at a matrix, or at all parameters at once. A slice would get another update.
_NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon", "SparseAdam")

_pieces_of = weakref.WeakKeyDictionary()  # model -> its pieces


class _Piece:
    """One parameter, of which this rank keeps the `rank`-th of N equal slices of its numbers.

    Hooks on the parameter hold this object. So it holds the parameter weakly: else the two would be
    a cycle through autograd that Python's garbage collector cannot see.
    """

    def __init__(self, parameter: nn.Parameter, stage: int, group):
        self.parameter = weakref.ref(parameter)
        self.shape = parameter.shape
        self.stage = stage
        self.group = group
        self.ranks = dist.get_world_size(group)
        rank = dist.get_rank(group)
        # Of a slice; the last one may be padded.
        self.length = math.ceil(parameter.numel() / self.ranks)
        self.slice = slice(rank * self.length, (rank + 1) * self.length)
        if stage == 0:
            self.shard = parameter
            return
        self.whole = parameter.new_zeros(self.ranks * self.length)
        self.whole[: parameter.numel()] = parameter.detach().reshape(-1)
        self.bytes = self.whole.untyped_storage().nbytes()
        self.is_whole = True
        parameter.data = self._view()
        if stage == 3:
            self.shard = nn.Parameter(self.whole[self.slice].clone())
            # What a parameter is while its numbers are elsewhere: its shape, one number, and NaN to
            # all who look.
            self.absent = parameter.new_full((), float("nan")).expand(self.shape)
            self.free()
        else:
            # A view: the step changes the whole parameter.
            self.shard = nn.Parameter(self.whole[self.slice])
        if stage >= 2:
            parameter.register_post_accumulate_grad_hook(self.reduce)

    def _view(self) -> Tensor:
        return self.whole[: self.shape.numel()].view(self.shape)

    @torch.no_grad()
    def gather(self) -> None:
        """Stage 3: make the parameter whole, in the storage that autograd has saved views of."""
        if not self.is_whole:
            self.whole.untyped_storage().resize_(self.bytes)
            getattr(dist, _ALL_GATHER)(self.whole, self.shard.detach(), group=self.group)
            self.parameter().data = self._view()
            self.is_whole = True

    def free(self) -> None:
        """Stage 3: give back the bytes of the whole parameter. The storage stays, empty."""
        if self.stage == 3 and self.is_whole:
            self.parameter().data = self.absent
            self.is_whole = False
            self.whole.untyped_storage().resize_(0)

    @torch.no_grad()
    def reduce(self, parameter: nn.Parameter) -> None:
        """Turn this rank's whole gradient into its slice of the mean over all ranks, and let the
        whole one go.

        At stage 3 the weight goes first: once its gradient is there, nothing needs it any more.
        """
        if self.stage == 0:
            dist.all_reduce(parameter.grad, group=self.group)
            parameter.grad.div_(self.ranks)
            return
        self.free()
        gradient = parameter.grad.reshape(-1)
        parameter.grad = None
        if padding := self.ranks * self.length - gradient.numel():
            gradient = nn.functional.pad(gradient, (0, padding))
        mean = gradient.new_empty(self.length)
        getattr(dist, _REDUCE_SCATTER)(mean, gradient, group=self.group)
        mean.div_(self.ranks)
        self.shard.grad = mean if self.shard.grad is None else self.shard.grad.add_(mean)


def shard_training(
    model: nn.Module, make_optimizer: Callable, stage: int = 3, *, blocks=None, group=None
) -> torch.optim.Optimizer:
    """Shard the training of a model over the ranks of a process group.

    Call it on every rank, with the same model; rank 0's weights are taken. Then train as on one
    device, each rank on data of its own: `loss.backward()`, `optimizer.step()`,
    `optimizer.zero_grad()`. The gradients are the mean over the ranks. Every rank has to do the
    same calls on the same parameters, or they wait for each other for ever. A norm of the gradients
    has to be added up over the ranks, in a hook on the step, since `clip_grad_norm_` sees one
    rank's slices. Read the weights of stage 3 in `whole_parameters`. Frozen parameters and buffers
    stay whole on each rank, and buffers are not kept equal.

    Args:
        model: The model, on this rank's device.
        make_optimizer: Called with this rank's part of each parameter, in the order of
            `model.parameters()`: the parameter itself at stage 0, else a flat slice
            `(numbers / ranks,)`. The optimizer has to treat each number by itself, as SGD, Adam and
            AdamW do. It is called once before, with parameters that have no numbers: what fails
            then has changed nothing.
        stage: 0 to 3, as in the table above.
        blocks: For stage 3, the modules that are made whole one at a time, or their class; None
            takes all lists (ModuleList, ModuleDict, Sequential) of modules of one class. What is in
            no block stays whole from the model's forward until backward is done with it.
        group: The process group; None takes the default one.

    Returns:
        The optimizer to train with.

    Raises:
        RuntimeError: There is no process group.
        ValueError: Another stage, a model with nothing to train, on the meta device or sharded
            already, blocks that cannot be found, or an optimizer of other parameters than it was
            given.
        TypeError: An optimizer that needs whole matrices.
    """
    _check_sharding(model, stage)
    blocks = list(_find_blocks(model, blocks).values()) if stage == 3 else []
    if model in blocks:
        raise ValueError(f"The {type(model).__name__} cannot be a block of itself: pass its parts.")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _try_optimizer(make_optimizer, parameters, stage)
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), group=group, group_src=0)
    pieces = [_Piece(parameter, stage, group) for parameter in parameters]
    _pieces_of[model] = pieces
    if stage == 3:
        for module, members in _units(model, blocks, parameters, pieces).items():
            _gather_around(module, members, root=module is model)

    shards = [piece.shard for piece in pieces]
    optimizer = make_optimizer(shards)
    _check_optimizer(optimizer, shards)
    _shard_the_step(model, optimizer, pieces)
    return optimizer


def _check_sharding(model: nn.Module, stage: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "There is no process group: start with torchrun, and call init_process_group."
        )
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"stage must be 0, 1, 2 or 3, but it is {stage!r}.")
    name = type(model).__name__
    if model in _pieces_of:
        raise ValueError(f"This {name} is sharded already, so it cannot be sharded.")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters or any(parameter.is_meta for parameter in parameters):
        raise ValueError(
            f"This {name} has no weights to train on a real device, so it cannot be sharded."
        )


def _try_optimizer(make_optimizer: Callable, parameters: list[nn.Parameter], stage: int) -> None:
    """Let an optimizer that cannot be made fail before anything of the model is changed: try it on
    parameters without a number.
    """
    empty = [
        nn.Parameter(parameter.new_empty((0, *parameter.shape[1:]) if stage == 0 else (0,)))
        for parameter in parameters
    ]
    _check_optimizer(make_optimizer(empty), empty)


def _check_optimizer(optimizer: torch.optim.Optimizer, shards: list[nn.Parameter]) -> None:
    if type(optimizer).__name__ in _NOT_ELEMENTWISE:
        raise TypeError(
            f"{type(optimizer).__name__} needs whole matrices, but a rank has slices: use AdamW."
        )
    groups = getattr(optimizer, "param_groups", [])
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    if stepped != {id(shard) for shard in shards}:
        raise ValueError(
            "make_optimizer must return an optimizer of exactly the parameters it is given."
        )


def _units(
    model: nn.Module, blocks: list[nn.Module], parameters: list[nn.Parameter], pieces: list[_Piece]
) -> dict[nn.Module, list[_Piece]]:
    """Stage 3: which pieces are whole together. What is in no block, or in several, is the
    model's.
    """
    members = {block: set(block.parameters()) for block in blocks}
    units = {module: [] for module in (model, *blocks)}
    for parameter, piece in zip(parameters, pieces, strict=True):
        containing = [block for block in blocks if parameter in members[block]]
        units[containing[0] if len(containing) == 1 else model].append(piece)
    return units


def _shard_the_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, pieces: list[_Piece]
) -> None:
    def before_step(*_) -> None:
        for piece in pieces:
            parameter = piece.parameter()
            if parameter is not None and parameter.grad is not None:
                piece.reduce(parameter)
            # Stage 3: a parameter that got no gradient is whole still.
            piece.free()

    def after_step(*_) -> None:
        for piece in pieces:
            # Stage 3 gathers when it needs them.
            if piece.stage in (1, 2):
                slice_of_this_rank = piece.whole[piece.slice]
                getattr(dist, _ALL_GATHER)(piece.whole, slice_of_this_rank, group=piece.group)

    def zero_grad(set_to_none: bool = True) -> None:
        """Let the gradients go: the whole ones and this rank's slices."""
        for piece in pieces:
            piece.shard.grad = None
            parameter = piece.parameter()
            if parameter is not None:
                parameter.grad = None

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    # Either alone would miss a part of the gradients.
    model.zero_grad = optimizer.zero_grad = zero_grad


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


def _gather_around(module: nn.Module, pieces: list[_Piece], root: bool) -> None:
    """Stage 3: the pieces are whole while `module` runs forward, and again from when backward
    reaches it.
    """

    def gather(*_) -> None:
        for piece in pieces:
            piece.gather()

    def after_forward(module, inputs, output) -> None:
        outputs = output.values() if isinstance(output, dict) else output
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        outputs = [item for item in outputs if isinstance(item, Tensor) and item.requires_grad]
        if root and outputs:
            return  # needed soon again: the loss, and backward's first layers
        for piece in pieces:
            piece.free()
        if outputs:
            register_multi_grad_hook(outputs, gather, mode="any")

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(after_forward)


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter of a sharded model is whole on every rank: to save or read it, not to
    change it.

    Args:
        model: A model of `shard_training`. One that is not sharded is whole as it is.
    """
    absent = [
        piece for piece in _pieces_of.get(model, ()) if piece.stage == 3 and not piece.is_whole
    ]
    for piece in absent:
        piece.gather()
    try:
        yield
    finally:
        for piece in absent:
            piece.free()


class RankError(RuntimeError):
    """A rank died (`rank` and `exit_code` say which, and how), or did not end in time (both are
    None).
    """

    def __init__(self, message: str, rank: int | None = None, exit_code: int | None = None):
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code


def run_ranks(
    script: str | os.PathLike, ranks: int, *arguments: object, seconds: float = 300
) -> list[str]:
    """Run a Python file in several processes on this machine, under torchrun.

    What this process can import, the ranks can; each computes in one thread.

    Args:
        script: The Python file.
        ranks: How many processes.
        arguments: For the script.
        seconds: After so many they are ended, wherever they hang.

    Returns:
        What each rank printed.

    Raises:
        RankError: A rank died (the others are ended too), or time is up. It has the end of the log.
        ValueError: A file that is not there, or numbers that are not positive.
    """
    if not Path(script).is_file():
        raise ValueError(f"There is no file {str(script)!r} to run.")
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1 or not seconds > 0:
        raise ValueError(
            f"ranks and seconds must be positive, but they are {ranks!r} and {seconds!r}."
        )
    with tempfile.TemporaryDirectory(prefix="ranks-") as logs:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        options = [f"--nproc-per-node={ranks}", f"--log-dir={logs}", "--redirects=3"]
        process = subprocess.Popen(
            [sys.executable, *launcher, *options, str(script), *map(str, arguments)],
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            ends = "".join(f"\nrank {rank}: {_tail(logs, rank)}" for rank in range(ranks))
            raise RankError(
                f"After {seconds:g} s {ranks} ranks were not done, so they were ended.{ends}"
            ) from None
        finally:
            # torchrun then ends its ranks: it asks them, and kills them 30 s later
            process.terminate()
            process.communicate()
        if process.returncode:
            raise _rank_error(process.returncode, said, ranks, logs)
        return [_log(logs, rank, "stdout") for rank in range(ranks)]


def _environment() -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # Else gloo asks what this machine is called, and may get no answer.
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            environment.setdefault("GLOO_SOCKET_IFNAME", name)
    return environment


def _rank_error(returncode: int, said: str, ranks: int, logs: str) -> RankError:
    """Read in what torchrun said which rank died first, and how."""
    root_cause = re.search(
        r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", said, re.DOTALL
    )
    if root_cause is None:
        return RankError(f"torchrun ended with exit code {returncode}: {said[-2000:]}")
    rank, code = map(int, root_cause.groups())
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    message = f"Rank {rank} of {ranks} died ({how}), so all were ended.\n{_tail(logs, rank)}"
    return RankError(message, rank, code)


def _log(logs: str, rank: int, stream: str) -> str:
    paths = Path(logs).glob(f"*/attempt_0/{rank}/{stream}.log")
    return "".join(path.read_text(errors="replace") for path in paths)


def _tail(logs: str, rank: int) -> str:
    lines = (_log(logs, rank, "stdout") + _log(logs, rank, "stderr")).strip().splitlines()
    return "\n".join(lines[-8:]) or "(it printed nothing)"
