"""Lean optimizers: train with less state than the two FP32 numbers, 8 bytes, that AdamW keeps a
parameter.

`AdamW8bit` keeps AdamW's two moments in 8 bits each: 2.03 bytes a parameter. `Lion` keeps one
moment and steps by its sign: 4 bytes. `Apollo` keeps AdamW's moments of a random projection of each
matrix, r rows for its m:
8 r / m bytes. Weights and gradients keep their size.

The price: 8 bits round, and are converted in each step; Lion and Apollo are not AdamW and need
learning rates of their own. All step one parameter after the other: the largest bounds what a step
needs on top.

Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2021), arXiv:2110.02861;
Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), arXiv:2302.06675, for Lion; Zhu
et al., "APOLLO:
SGD-like Memory, AdamW-level Performance" (2024), arXiv:2412.05270.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

_TINY = torch.finfo(
    torch.float32
).tiny  # the smallest normal number: divided by it, nothing becomes infinite
_MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim calls them

# --- Eight bits a number --------------------------------------------------------------------------


def code_table(signed: bool, *, dynamic: bool = True) -> Tensor:
    """Return the 256 values that 8 bits stand for, ascending, FP32 (256,).

    Signed, for a first moment, from -0.99 to 1; unsigned, for a second moment, from 0 to 1.
    Dynamic, as in the paper: each of seven powers of ten has twice as many values as the one below,
    so that small numbers are told apart. Not dynamic: equally spaced, too coarse near zero for a
    second moment.
    """
    return torch.tensor(_code_values(signed, dynamic), dtype=torch.float32)


@functools.cache
def _code_values(signed: bool, dynamic: bool) -> tuple[float, ...]:
    if not dynamic:
        return tuple(
            [code / 128 for code in range(-127, 129)]
            if signed
            else [code / 255 for code in range(256)]
        )
    values = [0.0, 1.0]
    for power in range(7):
        count = 2 ** (power if signed else power + 1) + 1
        edges = torch.linspace(0.1, 1, count, dtype=torch.float64, device="cpu")
        centres = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6)).tolist()
        values += centres + [-value for value in centres if signed]
    return tuple(sorted(values))


def quantize(values: Tensor, table: Tensor, block_size: int = 256) -> tuple[Tensor, Tensor]:
    """Return `values`, of any shape, as codes, uint8 (block, block_size), and scales, FP32
    (block,).

    A block is `block_size` numbers in a row; the last one is filled up with zeros. Its scale is its
    largest absolute value. Each number, divided by it, becomes the position of the nearest value in
    `table` (256,). A block with a NaN or an infinity is NaN when it is read again: it is not lost.

    Raises ValueError for a `block_size` below 1 or a table that is not 256 FP32 values.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, but it is {block_size}.")
    if table.shape != (256,) or table.dtype != torch.float32:
        raise ValueError(
            f"table must be 256 FP32 values, but it is {tuple(table.shape)}, {table.dtype}."
        )
    row = values.detach().float().flatten()
    blocks = F.pad(row, (0, -len(row) % block_size)).view(-1, block_size)  # a copy, always
    codes, scales = torch.empty_like(blocks, dtype=torch.uint8), blocks.new_empty(len(blocks))
    _quantize_into(codes, scales, blocks, _halfway(table))
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Return the FP32 numbers (block, block_size) that `codes`, of that shape, and `scales`
    (block,) mean.
    """
    values = table.index_select(
        0, codes.flatten().int()
    )  # an index of 8 bits would be taken for a mask
    return values.view(codes.shape).mul_(scales.unsqueeze(1))


def _quantize_into(codes: Tensor, scales: Tensor, blocks: Tensor, halfway: Tensor) -> None:
    """Write what `quantize` returns. In place, to need little: `blocks` are divided by their
    scales.
    """
    torch.linalg.vector_norm(blocks, ord=math.inf, dim=1, out=scales)
    blocks.div_(scales.clamp(min=_TINY).unsqueeze(1))  # a block of zeros stays zero, and is not NaN
    codes.copy_(torch.bucketize(blocks, halfway, out_int32=True, right=True))


def _halfway(table: Tensor) -> Tensor:
    return (
        table[:-1] + table[1:]
    ) / 2  # what lies between two of these is nearest to the value between them


# --- The optimizers -------------------------------------------------------------------------------


def load_state_dict(optimizer: Optimizer, state_dict: dict) -> None:
    """Take over what `state_dict` returned, bit for bit. Raises ValueError when the groups do not
    fit.
    """
    # PyTorch's own way turns 8-bit codes, and FP32 moments of 16-bit weights, into the type of the
    # parameter.
    Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        saved = state_dict["state"].get(number, {})
        for name, value in saved.items():
            if isinstance(value, Tensor) and f"{name.removesuffix('_scale')}_scale" in saved:
                near = optimizer.device or parameter.device
                value = optimizer.zeros(value.shape, dtype=value.dtype, device=near).copy_(value)
            elif isinstance(value, Tensor):
                value = value.to(parameter.device, copy=True)
            optimizer.state[parameter][name] = value


class AdamW8bit(Optimizer):
    """AdamW whose two moments are 8-bit codes, with one FP32 scale for each block of `block_size`
    numbers.

    State: 2 (1 + 4 / block_size) bytes a parameter. Tensors of fewer than `smallest` numbers
    (biases, norms) keep FP32 moments, 8 bytes. A step takes `slice_size` numbers at a time, and
    needs 12 bytes for each, 20 with 16-bit weights. The weights are updated with the new moments as
    they are before they are rounded. `dynamic=False` takes equally spaced codes, to see why they
    are not used.

    rounding: from an FP32 tensor to its 16-bit one. With it the update of 16-bit weights is
        computed in FP32 and rounded by it: stochastically, or small updates are lost.
        `stochastic_round` needs 19 bytes, not 20.
    zeros: makes the state of 8 bits, with the arguments of `torch.zeros`. It may lie elsewhere,
        such as in a mapped file: of each slice a copy comes to the parameter's device, and goes
        back.
    device: where steps are computed, if not where the parameters lie: weights on a GPU's host come
        near a slice at a time with their gradients, and the weights go back. (Tensors below
        `smallest` are stepped where they are.)

    Raises ValueError for a number out of range, TypeError for a `rounding` or `zeros` that is no
    function.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        *,
        block_size=256,
        smallest=4096,
        slice_size=2**20,
        dynamic=True,
        rounding=None,
        zeros=torch.zeros,
        device: torch.device | str | None = None,
    ):
        _check(lr, betas, weight_decay, eps)
        if not 1 <= block_size <= slice_size:
            raise ValueError(
                f"1 <= block_size <= slice_size must hold, but they are {block_size} and"
                f" {slice_size}."
            )
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "dynamic": dynamic,
        }
        options |= {"block_size": block_size, "smallest": smallest, "slice_size": slice_size}
        if not callable(zeros) or not (rounding is None or callable(rounding)):
            raise TypeError(
                f"rounding and zeros must be functions, but they are {rounding!r} and {zeros!r}."
            )
        super().__init__(params, options)
        self.rounding, self.zeros, self.device = rounding, zeros, device and torch.device(device)

    def __getstate__(self):  # for copy and pickle, which would leave them out
        own = {name: getattr(self, name) for name in ("rounding", "zeros", "device")}
        return {**super().__getstate__(), **own}

    load_state_dict = load_state_dict

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. Raises ValueError for one that is sparse or
        not real.
        """
        loss = _loss(closure)
        left = False  # whether something is on its way to the host
        # 4 KiB, made anew in each step: nothing that has to be saved, or moved to a device
        tables = {}
        for parameter, gradient, state, group, _ in _with_gradients(self):
            size, device, count = (
                group["block_size"],
                self.device or parameter.device,
                parameter.numel(),
            )
            if count < group["smallest"]:
                _adamw(parameter, gradient, state, group, self.rounding)
                continue
            if not state:
                state["step"] = 0
                for name in _MOMENTS:
                    state[name] = self.zeros(
                        -(-count // size), size, dtype=torch.uint8, device=device
                    )
                    state[f"{name}_scale"] = self.zeros(-(-count // size), device=device)
            state["step"] += 1
            key = (group["dynamic"], device)
            if key not in tables:
                pair = [
                    code_table(signed, dynamic=group["dynamic"]).to(device)
                    for signed in (True, False)
                ]
                tables[key] = [(table, _halfway(table)) for table in pair]
            # In one row, of which a slice is a view. What is not contiguous is copied, and copied
            # back.
            weights, gradients = parameter.contiguous().view(-1), gradient.contiguous().view(-1)
            rows = group["slice_size"] // size
            for first in range(0, len(state["exp_avg"]), rows):
                part, numbers = (
                    slice(first, first + rows),
                    slice(first * size, (first + rows) * size),
                )
                stored = [
                    state[f"{name}{what}"][part] for name in _MOMENTS for what in ("", "_scale")
                ]
                stored.append(weights[numbers])
                near = [
                    one.to(device, non_blocking=True) for one in stored
                ]  # the same, if they are there
                kept, weight = (near[:2], near[2:4]), near[4]
                blocks = [
                    dequantize(*one, table)
                    for one, (table, _) in zip(kept, tables[key], strict=True)
                ]
                moments = [one.view(-1)[: count - first * size] for one in blocks]
                _adamw_update(
                    weight,
                    gradients[numbers].to(device, non_blocking=True),
                    *moments,
                    state["step"],
                    group,
                    self.rounding,
                )
                for one, new, (_, halfway) in zip(kept, blocks, tables[key], strict=True):
                    _quantize_into(*one, new, halfway)
                for one, new in zip(stored, near, strict=True):
                    if new.device != one.device:
                        one.copy_(new, non_blocking=True)
                        left = left or new.is_cuda
                del (
                    blocks,
                    moments,
                    kept,
                    near,
                    weight,
                    new,
                )  # else they are there when the next slice is read
            if not parameter.is_contiguous():
                if left:
                    torch.cuda.synchronize()
                parameter.copy_(weights.view(parameter.shape))
        if left:  # what is on its way to the host may be read now
            torch.cuda.synchronize()
        return loss


class Lion(Optimizer):
    """Step by the sign of momentum mixed with gradient: each weight moves by `lr`, up or down.
    State: 4 bytes.

    Begin with a third of AdamW's learning rate. Raises ValueError for a number out of range.
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-2):
        _check(lr, betas, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. Raises ValueError for one that is sparse or
        not real.
        """
        loss = _loss(closure)
        for parameter, gradient, state, group, _ in _with_gradients(self):
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
            beta1, beta2 = group["betas"]
            direction = state["exp_avg"].lerp(gradient, 1 - beta1).sign_()
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                direction, alpha=-group["lr"]
            )
            del direction  # else it is there when the next one is made
            state["exp_avg"].lerp_(gradient, 1 - beta2)
            parameter.add_(
                state["exp_avg"], alpha=0
            )  # a NaN has the sign 0: without this it would be lost
        return loss


class Apollo(Optimizer):
    """SGD with a step length for each column, which AdamW finds on a random projection of the
    gradient.

    A gradient (m, n), m <= n, or its transpose, is projected to (rank, n). Of that, AdamW's moments
    are kept: 8 rank / m bytes a parameter. By how much AdamW scales a column there, the gradient's
    column is scaled. The projection is drawn from `seed`, anew every `interval` steps, and not
    stored. Vectors, and matrices with m <= rank, get AdamW. Scales have a factor sqrt(m / rank), so
    that AdamW's learning rates fit; an update's norm grows by 1 % a step at most (`growth`). With a
    rank below 4 a column can vanish in its projection, and its step explode. Raises ValueError for
    a number out of range.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        *,
        rank=8,
        interval=200,
        growth=1.01,
        seed=0,
    ):
        _check(lr, betas, weight_decay, eps)
        if min(rank, interval, growth) < 1:
            raise ValueError(
                f"rank, interval and growth must be at least 1, but they are {rank}, {interval} and"
                f" {growth}."
            )
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= {"rank": rank, "interval": interval, "growth": growth, "seed": seed}
        super().__init__(params, options)

    load_state_dict = load_state_dict

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. Raises ValueError for one that is sparse or
        not real.
        """
        loss = _loss(closure)
        for parameter, gradient, state, group, index in _with_gradients(self):
            rank, device = group["rank"], parameter.device
            if parameter.ndim != 2 or min(parameter.shape) <= rank:
                _adamw(parameter, gradient, state, group)
                continue
            if parameter.shape[0] > parameter.shape[1]:
                parameter, gradient = parameter.T, gradient.T
            m, n = parameter.shape
            if not state:
                state.update(step=0, exp_avg=torch.zeros(rank, n, device=device))
                state.update(exp_avg_sq=torch.zeros(rank, n, device=device))
            seed = (group["seed"] * 1_000_003 + index) * 1_000_003 + state["step"] // group[
                "interval"
            ]
            draw = torch.Generator(device).manual_seed(seed % 2**63)
            state["step"] += 1
            projected = torch.randn(rank, m, generator=draw, device=device) @ gradient.float()
            before = torch.linalg.vector_norm(projected, dim=0).clamp_(min=_TINY)
            direction = _denominator(
                projected, state["exp_avg"], state["exp_avg_sq"], state["step"], group
            )
            torch.div(state["exp_avg"], direction, out=direction)
            # The projection, of numbers with variance 1, has made the columns sqrt(rank) longer.
            factor = math.sqrt(m) / (1 - group["betas"][0] ** state["step"])
            scale = torch.linalg.vector_norm(direction, dim=0).div_(before).mul_(factor)
            norm = torch.linalg.vector_norm(
                torch.linalg.vector_norm(gradient.float(), dim=0).mul_(scale)
            )
            if "norm" in state:
                most = torch.where(state["norm"] > 0, group["growth"] * state["norm"], norm)
                scale *= (most / norm.clamp(min=_TINY)).clamp_(max=1)
                norm = torch.minimum(norm, most)
            state["norm"] = norm
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addcmul_(gradient, scale.to(gradient.dtype), value=-group["lr"])
        return loss


# --- What they share ------------------------------------------------------------------------------


def _check(lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 0.0) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, but it is {value}.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"betas must be two numbers, at least 0 and below 1, but they are {betas}."
        )


def _loss(closure):
    with torch.enable_grad():
        return None if closure is None else closure()


def _with_gradients(optimizer: Optimizer) -> Iterator[tuple]:
    """(parameter, gradient, state, group, index) of every parameter that has a gradient."""
    every = (
        (group, parameter) for group in optimizer.param_groups for parameter in group["params"]
    )
    for index, (group, parameter) in enumerate(every):
        if (gradient := parameter.grad) is None:
            continue
        if gradient.layout != torch.strided or not parameter.is_floating_point():
            raise ValueError(
                f"{type(optimizer).__name__} takes real parameters with dense gradients, but"
                f" parameter {index} is {parameter.dtype} and its gradient {gradient.layout}."
            )
        yield parameter, gradient, optimizer.state[parameter], group, index


def _denominator(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: dict
) -> Tensor:
    """Update AdamW's moments, and return what it divides the first of them by."""
    (beta1, beta2), gradient = group["betas"], gradient.float()
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])


def _adamw_update(
    parameter, gradient, exp_avg, exp_avg_sq, step: int, group: dict, rounding=None
) -> None:
    denominator = _denominator(gradient, exp_avg, exp_avg_sq, step, group)
    # FP32 weights are updated where they are.
    exact = parameter if rounding is None or parameter.dtype.itemsize > 2 else parameter.float()
    exact.mul_(1 - group["lr"] * group["weight_decay"])
    exact.addcdiv_(exp_avg, denominator, value=-group["lr"] / (1 - group["betas"][0] ** step))
    if exact is not parameter:
        del denominator  # rounding needs as much
        parameter.copy_(rounding(exact))


def _adamw(parameter: Tensor, gradient: Tensor, state: dict, group: dict, rounding=None) -> None:
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(parameter, dtype=torch.float32))
        state.update(exp_avg_sq=torch.zeros_like(parameter, dtype=torch.float32))
    state["step"] += 1
    _adamw_update(
        parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], group, rounding
    )
