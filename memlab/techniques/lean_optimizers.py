"""Lean optimizers: train with less state than the two FP32 numbers, 8 bytes, that AdamW keeps a
parameter.

`AdamW8bit` keeps AdamW's two moments in 8 bits each: 2.03 bytes a parameter. `Lion` keeps one
moment and steps by its sign: 4 bytes. `Apollo` keeps AdamW's moments of a random projection of each
matrix, r rows for its m: 8 r / m bytes. Weights and gradients keep their size.

The price: 8 bits round, and are converted in each step; Lion and Apollo are not AdamW and need
learning rates of their own. All step one parameter after the other: the largest bounds what a step
needs on top.

Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2021), arXiv:2110.02861;
Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), arXiv:2302.06675, for Lion; Zhu
et al., "APOLLO: SGD-like Memory, AdamW-level Performance" (2024), arXiv:2412.05270.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

#: The smallest normal number: divided by it, nothing becomes infinite.
_TINY = torch.finfo(torch.float32).tiny

#: As torch.optim calls them.
_MOMENTS = ("exp_avg", "exp_avg_sq")

# --- Eight bits a number --------------------------------------------------------------------------


def code_table(signed: bool, *, dynamic: bool = True) -> Tensor:
    """Return the 256 values that 8 bits stand for.

    Args:
        signed: From -0.99 to 1, for a first moment. Else from 0 to 1, for a second moment.
        dynamic: As in the paper, each of seven powers of ten has twice as many values as the one
            below, so that small numbers are told apart. False spaces them equally, which is too
            coarse near zero for a second moment.

    Returns:
        The values, ascending, FP32 `(256,)`.
    """
    return torch.tensor(_code_values(signed, dynamic), dtype=torch.float32)


@functools.cache
def _code_values(signed: bool, dynamic: bool) -> tuple[float, ...]:
    if not dynamic and signed:
        return tuple(code / 128 for code in range(-127, 129))
    if not dynamic:
        return tuple(code / 255 for code in range(256))
    values = [0.0, 1.0]
    for power in range(7):
        count = 2 ** (power if signed else power + 1) + 1
        edges = torch.linspace(0.1, 1, count, dtype=torch.float64, device="cpu")
        centres = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6)).tolist()
        values += centres + [-value for value in centres if signed]
    return tuple(sorted(values))


def quantize(values: Tensor, table: Tensor, block_size: int = 256) -> tuple[Tensor, Tensor]:
    """Turn numbers into 8-bit codes, with one scale for each block of them.

    A block is `block_size` numbers in a row; the last one is filled up with zeros. Its scale is its
    largest absolute value. Each number, divided by it, becomes the position of the nearest value in
    the table. A block with a NaN or an infinity is NaN when it is read again: it is not lost.

    Args:
        values: Numbers in any shape.
        table: The values that codes stand for, as `code_table` returns them, FP32 `(256,)`.
        block_size: Numbers that share a scale.

    Returns:
        The codes, uint8 `(block, block_size)`, and the scales, FP32 `(block,)`.

    Raises:
        ValueError: A `block_size` below 1, or a table that is not 256 FP32 values.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, but it is {block_size}.")
    if table.shape != (256,) or table.dtype != torch.float32:
        raise ValueError(
            f"table must be 256 FP32 values, but it is {tuple(table.shape)}, {table.dtype}."
        )
    row = values.detach().float().flatten()
    padding = -len(row) % block_size
    blocks = F.pad(row, (0, padding)).view(-1, block_size)  # a copy, always
    codes = torch.empty_like(blocks, dtype=torch.uint8)
    scales = blocks.new_empty(len(blocks))
    _quantize_into(codes, scales, blocks, _halfway(table))
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Turn 8-bit codes into numbers again.

    Args:
        codes: As `quantize` returns them, uint8 `(block, block_size)`.
        scales: FP32 `(block,)`.
        table: The values that codes stand for, FP32 `(256,)`.

    Returns:
        The numbers, FP32 `(block, block_size)`.
    """
    # As int32: an index of 8 bits would be taken for a mask.
    values = table.index_select(0, codes.flatten().int())
    return values.view(codes.shape).mul_(scales.unsqueeze(1))


def _quantize_into(codes: Tensor, scales: Tensor, blocks: Tensor, halfway: Tensor) -> None:
    """Write what `quantize` returns. In place, to need little: `blocks` are divided by their
    scales.
    """
    torch.linalg.vector_norm(blocks, ord=math.inf, dim=1, out=scales)
    # At least a tiny number: so a block of zeros stays zero, and is not NaN.
    blocks.div_(scales.clamp(min=_TINY).unsqueeze(1))
    codes.copy_(torch.bucketize(blocks, halfway, out_int32=True, right=True))


def _halfway(table: Tensor) -> Tensor:
    """What lies between two of these is nearest to the value between them."""
    return (table[:-1] + table[1:]) / 2


# --- The optimizers -------------------------------------------------------------------------------


def load_state_dict(optimizer: Optimizer, state_dict: dict) -> None:
    """Take over what `state_dict` returned, bit for bit.

    PyTorch's own way turns 8-bit codes, and FP32 moments of 16-bit weights, into the type of the
    parameter.

    Args:
        optimizer: An optimizer of this module.
        state_dict: What `state_dict()` of such an optimizer returned.

    Raises:
        ValueError: The groups do not fit.
    """
    Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        saved = state_dict["state"].get(number, {})
        for name, value in saved.items():
            if isinstance(value, Tensor) and f"{name.removesuffix('_scale')}_scale" in saved:
                device = optimizer.device or parameter.device
                zeros = optimizer.zeros(value.shape, dtype=value.dtype, device=device)
                value = zeros.copy_(value)
            elif isinstance(value, Tensor):
                value = value.to(parameter.device, copy=True)
            optimizer.state[parameter][name] = value


class AdamW8bit(Optimizer):
    """AdamW whose two moments are 8-bit codes, with one FP32 scale for each block of numbers.

    State: 2 (1 + 4 / block_size) bytes a parameter. A step takes some numbers at a time, and needs
    12 bytes for each, 20 with 16-bit weights. The weights are updated with the new moments as they
    are before they are rounded.

    Args:
        params: Parameters or groups of them, as for any optimizer.
        lr, betas, eps, weight_decay: As for `torch.optim.AdamW`.
        block_size: Numbers that share a scale.
        smallest: Tensors of fewer numbers (biases, norms) keep FP32 moments, 8 bytes, and are
            stepped where they are.
        slice_size: Numbers that a step takes at a time.
        dynamic: False takes equally spaced codes, to see why they are not used.
        rounding: From an FP32 tensor to its 16-bit one. With it the update of 16-bit weights is
            computed in FP32 and rounded by it: stochastically, or small updates are lost.
            `stochastic_round` needs 19 bytes a number, not 20.
        zeros: Makes the state of 8 bits, with the arguments of `torch.zeros`. It may lie elsewhere,
            such as in a mapped file: of each slice a copy comes to the parameter's device, and goes
            back.
        device: Where steps are computed, if not where the parameters lie: weights on a GPU's host
            come near a slice at a time with their gradients, and the weights go back.

    Raises:
        ValueError: A number out of range.
        TypeError: A `rounding` or `zeros` that is no function.
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
        _check_numbers(lr, betas, weight_decay, eps)
        if not 1 <= block_size <= slice_size:
            raise ValueError(
                f"1 <= block_size <= slice_size must hold, but they are {block_size} and"
                f" {slice_size}."
            )
        if not callable(zeros) or not (rounding is None or callable(rounding)):
            raise TypeError(
                f"rounding and zeros must be functions, but they are {rounding!r} and {zeros!r}."
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "dynamic": dynamic,
            "block_size": block_size,
            "smallest": smallest,
            "slice_size": slice_size,
        }
        super().__init__(params, defaults)
        self.rounding = rounding
        self.zeros = zeros
        self.device = device and torch.device(device)

    def __getstate__(self):
        # For copy and pickle, which would leave these out.
        attributes = {name: getattr(self, name) for name in ("rounding", "zeros", "device")}
        return {**super().__getstate__(), **attributes}

    load_state_dict = load_state_dict

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss again, as for any optimizer.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: A parameter or gradient that is sparse or not real.
        """
        loss = _loss(closure)
        leaving = False  # whether something is on its way to the host
        # 4 KiB, made anew in each step: nothing that has to be saved, or moved to a device
        tables = {}
        for parameter, gradient, state, group, _ in _with_gradients(self):
            if parameter.numel() < group["smallest"]:
                _adamw(parameter, gradient, state, group, self.rounding)
                continue
            device = self.device or parameter.device
            if not state:
                self._begin(state, parameter.numel(), group["block_size"], device)
            state["step"] += 1
            key = (group["dynamic"], device)
            if key not in tables:
                tables[key] = _tables(*key)

            # In one row, of which a slice is a view. What is not contiguous is copied, and copied
            # back.
            weights = parameter.contiguous().view(-1)
            gradients = gradient.contiguous().view(-1)
            rows_at_once = group["slice_size"] // group["block_size"]
            for first in range(0, len(state["exp_avg"]), rows_at_once):
                rows = slice(first, first + rows_at_once)
                if self._step_slice(rows, weights, gradients, state, group, tables[key]):
                    leaving = True
            if not parameter.is_contiguous():
                if leaving:
                    torch.cuda.synchronize()
                parameter.copy_(weights.view(parameter.shape))
        if leaving:  # it may be read now
            torch.cuda.synchronize()
        return loss

    def _begin(self, state: dict, count: int, block_size: int, device: torch.device) -> None:
        blocks = math.ceil(count / block_size)
        state["step"] = 0
        for name in _MOMENTS:
            state[name] = self.zeros(blocks, block_size, dtype=torch.uint8, device=device)
            state[f"{name}_scale"] = self.zeros(blocks, device=device)

    def _step_slice(
        self, rows: slice, weights: Tensor, gradients: Tensor, state: dict, group: dict, tables
    ) -> bool:
        """Step the numbers of some rows of codes. Return whether something is on its way to the
        host. What is computed here ends here, before the next slice is read.
        """
        device = self.device or weights.device
        numbers = slice(rows.start * group["block_size"], rows.stop * group["block_size"])
        stored = [state[f"{name}{suffix}"][rows] for name in _MOMENTS for suffix in ("", "_scale")]
        stored.append(weights[numbers])

        # The same tensors, if they are on the device.
        copies = [tensor.to(device, non_blocking=True) for tensor in stored]
        *quantized, weight = copies
        pairs = (quantized[:2], quantized[2:])
        blocks = [dequantize(*pair, table) for pair, (table, _) in zip(pairs, tables, strict=True)]
        moments = [block.view(-1)[: len(weight)] for block in blocks]
        _adamw_update(
            weight,
            gradients[numbers].to(device, non_blocking=True),
            *moments,
            state["step"],
            group,
            self.rounding,
        )
        for pair, block, (_, halfway) in zip(pairs, blocks, tables, strict=True):
            _quantize_into(*pair, block, halfway)

        leaving = False
        for tensor, copied in zip(stored, copies, strict=True):
            if copied.device != tensor.device:
                tensor.copy_(copied, non_blocking=True)
                leaving = leaving or copied.is_cuda
        return leaving


def _tables(dynamic: bool, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each of the two moments the values of its codes, and what is halfway between them."""
    values = [code_table(signed, dynamic=dynamic).to(device) for signed in (True, False)]
    return [(table, _halfway(table)) for table in values]


class Lion(Optimizer):
    """Step by the sign of momentum mixed with gradient: each weight moves by `lr`, up or down.

    State: 4 bytes a parameter. Begin with a third of AdamW's learning rate.

    Args:
        params: Parameters or groups of them, as for any optimizer.
        lr, betas, weight_decay: As in the paper.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-2):
        _check_numbers(lr, betas, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss again, as for any optimizer.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: A parameter or gradient that is sparse or not real.
        """
        loss = _loss(closure)
        for parameter, gradient, state, group, _ in _with_gradients(self):
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
            beta1, beta2 = group["betas"]
            direction = state["exp_avg"].lerp(gradient, 1 - beta1).sign_()
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"])
            # Else it is there when the next one is made.
            del direction
            state["exp_avg"].lerp_(gradient, 1 - beta2)
            # A NaN has the sign 0: without this it would be lost.
            parameter.add_(state["exp_avg"], alpha=0)
        return loss


class Apollo(Optimizer):
    """SGD with a step length for each column, which AdamW finds on a random projection of the
    gradient.

    A gradient (m, n), m <= n, or its transpose, is projected to (rank, n). Of that, AdamW's moments
    are kept: 8 rank / m bytes a parameter. By how much AdamW scales a column there, the gradient's
    column is scaled. Scales have a factor sqrt(m / rank), so that AdamW's learning rates fit.

    Args:
        params: Parameters or groups of them, as for any optimizer.
        lr, betas, eps, weight_decay: As for `torch.optim.AdamW`.
        rank: Rows of the projection. Vectors, and matrices with m <= rank, get AdamW. With a rank
            below 4 a column can vanish in its projection, and its step explode.
        interval: The projection is drawn anew after so many steps, and not stored.
        growth: An update's norm grows at most by this factor from step to step.
        seed: From which projections are drawn.

    Raises:
        ValueError: A number out of range.
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
        _check_numbers(lr, betas, weight_decay, eps)
        if min(rank, interval, growth) < 1:
            raise ValueError(
                f"rank, interval and growth must be at least 1, but they are {rank}, {interval} and"
                f" {growth}."
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "interval": interval,
            "growth": growth,
            "seed": seed,
        }
        super().__init__(params, defaults)

    load_state_dict = load_state_dict

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss again, as for any optimizer.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: A parameter or gradient that is sparse or not real.
        """
        loss = _loss(closure)
        for parameter, gradient, state, group, index in _with_gradients(self):
            rank = group["rank"]
            if parameter.ndim != 2 or min(parameter.shape) <= rank:
                _adamw(parameter, gradient, state, group)
                continue
            if parameter.shape[0] > parameter.shape[1]:
                parameter, gradient = parameter.T, gradient.T
            projection = _projection(parameter, state, group, index)
            state["step"] += 1
            projected = projection @ gradient.float()
            del projection
            length = torch.linalg.vector_norm(projected, dim=0).clamp_(min=_TINY)
            moments = state["exp_avg"], state["exp_avg_sq"]
            direction = _denominator(projected, *moments, state["step"], group)
            torch.div(state["exp_avg"], direction, out=direction)

            # The projection, of numbers with variance 1, has made the columns sqrt(rank) longer.
            factor = math.sqrt(len(parameter)) / (1 - group["betas"][0] ** state["step"])
            scale = torch.linalg.vector_norm(direction, dim=0).div_(length).mul_(factor)
            columns = torch.linalg.vector_norm(gradient.float(), dim=0).mul_(scale)
            norm = torch.linalg.vector_norm(columns)
            del columns
            if "norm" in state:
                most = torch.where(state["norm"] > 0, group["growth"] * state["norm"], norm)
                scale *= (most / norm.clamp(min=_TINY)).clamp_(max=1)
                norm = torch.minimum(norm, most)
            state["norm"] = norm
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addcmul_(gradient, scale.to(gradient.dtype), value=-group["lr"])
        return loss


def _projection(matrix: Tensor, state: dict, group: dict, index: int) -> Tensor:
    """Draw the projection (rank, m) for a matrix (m, n), and begin its state."""
    m, n = matrix.shape
    rank = group["rank"]
    if not state:
        state["step"] = 0
        for name in _MOMENTS:
            state[name] = torch.zeros(rank, n, device=matrix.device)
    draw = state["step"] // group["interval"]
    seed = (group["seed"] * 1_000_003 + index) * 1_000_003 + draw
    generator = torch.Generator(matrix.device).manual_seed(seed % 2**63)
    return torch.randn(rank, m, generator=generator, device=matrix.device)


# --- What they share ------------------------------------------------------------------------------


def _check_numbers(
    lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 0.0
) -> None:
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
    parameters = (
        (group, parameter) for group in optimizer.param_groups for parameter in group["params"]
    )
    for index, (group, parameter) in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
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
    beta1, beta2 = group["betas"]
    gradient = gradient.float()
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])


def _adamw_update(
    parameter, gradient, exp_avg, exp_avg_sq, step: int, group: dict, rounding=None
) -> None:
    denominator = _denominator(gradient, exp_avg, exp_avg_sq, step, group)
    # Where they are, if they are FP32.
    in_place = rounding is None or parameter.dtype.itemsize > 2
    updated = parameter if in_place else parameter.float()
    updated.mul_(1 - group["lr"] * group["weight_decay"])
    updated.addcdiv_(exp_avg, denominator, value=-group["lr"] / (1 - group["betas"][0] ** step))
    if updated is not parameter:
        del denominator  # rounding needs as much
        parameter.copy_(rounding(updated))


def _adamw(parameter: Tensor, gradient: Tensor, state: dict, group: dict, rounding=None) -> None:
    if not state:
        state["step"] = 0
        for name in _MOMENTS:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
    state["step"] += 1
    moments = state["exp_avg"], state["exp_avg_sq"]
    _adamw_update(parameter, gradient, *moments, state["step"], group, rounding)
