"""Low precision: weights, gradients, optimizer state and activations in BF16, 2 bytes each instead
of 4.

`cast_to_low_precision` casts a model, and everything that training makes of it halves. The cost is
precision: a BF16 number has 8 significant bits, so a weight does not move when its update is
smaller than half the distance to its neighbour, which is 1/512 to 1/256 of the weight. Two
optimizers cure that. `StochasticRoundingAdamW` rounds up or down at random, so that the mean is
right, and needs no byte more. `MasterWeightAdamW` keeps an FP32 copy of the weights and FP32
moments, 12 bytes a parameter. `to_float8` stores numbers in one byte; it computes nothing.

Sources: Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training" (2019), arXiv:1905.12322;
Zamirai et al., "Revisiting BFloat16 Training" (2020), arXiv:2010.06192 (stochastic rounding);
Micikevicius et al., "Mixed Precision Training" (2018), arXiv:1710.03740 (master weights), and "FP8
Formats for Deep Learning" (2022), arXiv:2209.05433.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def cast_to_low_precision(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    *,
    keep: Iterable[str] = (),
    cast_inputs: bool = True,
) -> None:
    """Cast a model's floating-point parameters and buffers to 16 bits, in place, before the
    optimizer exists.

    Parameters stay the same objects, and shared ones stay shared. There is no way back: the bits
    are gone. From then on, a forward pre-hook casts what the model is given, such as images: its
    layers would refuse FP32.

    Args:
        model: The model to cast.
        dtype: `torch.bfloat16` or `torch.float16`.
        keep: Parameters and buffers to leave as they are, by their full name or its last part. A
            rotary embedding's `inv_freq`, for one: a position in the thousands times a frequency of
            8 significant bits is radians off.
        cast_inputs: Let the model cast its floating-point inputs of two axes and more, by position
            or name, also in lists, tuples and dicts. What has one number a row, as time steps or
            targets, stays as it is. So does what goes round the model's forward, as `generate` of
            an encoder-decoder does. False leaves all to the caller.

    Raises:
        ValueError: Another dtype, a model without floating-point parameters or with complex ones, a
            name in `keep` that is nobody's, parameters that have gradients, or numbers too large
            for the dtype. Nothing is changed then.
        TypeError: `model` is no module.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, but it is {dtype}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    # With duplicates, so that a shared parameter can be kept by each of its names.
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    kept = _kept(model, tensors, {keep} if isinstance(keep, str) else set(keep))
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no floating-point parameters, so there is nothing to cast."
        )
    cast = []
    for name, tensor in tensors:
        if id(tensor) in kept:
            continue
        if tensor.is_complex():
            raise ValueError(
                f"{name} is complex, and there are no complex numbers in {dtype}: keep it."
            )
        if tensor.is_floating_point():
            _check_tensor(name, tensor, dtype)
            cast.append(tensor)
    for tensor in cast:
        tensor.data = tensor.data.to(dtype)
    if cast_inputs:
        model.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def _cast_inputs(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Give a model its inputs in the dtype that its weights have now."""
    low = (p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16))
    dtype = next(low, None)
    return (args, kwargs) if dtype is None else _cast((args, kwargs), dtype)


def _cast(value, dtype: torch.dtype):
    if isinstance(value, Tensor):
        is_cast = value.ndim > 1 and value.dtype in _WIDE
        return value.to(dtype) if is_cast else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def _kept(model: nn.Module, tensors: list[tuple[str, Tensor]], keep: set[str]) -> set[int]:
    """Return the ids of the tensors that `keep` names."""
    names_of = {name: {name, name.rpartition(".")[2]} for name, _ in tensors}
    if unknown := keep.difference(*names_of.values()):
        raise ValueError(
            f"keep names {', '.join(sorted(unknown))}, but {type(model).__name__} has no such"
            " parameter or buffer."
        )
    return {id(tensor) for name, tensor in tensors if keep & names_of[name]}


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.grad is not None:
        raise ValueError(
            f"{name} has a gradient: call zero_grad() first, then cast, then make the optimizer."
        )
    # In slices: looking at all of an embedding at once would need more memory than the cast itself.
    slices = () if tensor.is_meta else tensor.detach().reshape(-1).split(2**16)
    for numbers in slices:
        if (numbers.isfinite() & ~numbers.to(dtype).isfinite()).any():
            largest = torch.finfo(dtype).max
            raise ValueError(
                f"{name} holds a number above {largest:.4g}, the largest in {dtype}: use another."
            )


@torch.no_grad()
def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round FP32 to BF16, up or down at random, so that the mean of many roundings is the number
    itself.

    A number that stands a quarter of the way to its upper neighbour goes up in one of four cases.
    BF16 numbers, infinities and NaNs stay what they are; beyond BF16's largest number is infinity.

    Args:
        x: FP32, of any shape.
        generator: Where the random numbers are from, on the tensor's device; by default PyTorch's
            own.

    Returns:
        BF16, of the same shape.

    Raises:
        TypeError: A tensor that is not FP32.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        raise TypeError(
            f"x must be an FP32 tensor, but it is {getattr(x, 'dtype', type(x).__name__)}."
        )
    # BF16 is the upper half of FP32's bits. A random lower half is added, and carries into the
    # upper half as often as the old lower half was large; then the lower half is cut off.
    bits = torch.empty_like(x, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    bits.add_(x.view(torch.int32)).bitwise_and_(-1 << 16)
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    return rounded.masked_fill_(x.isnan(), torch.nan)  # the carry can turn a NaN into a number


def _add_param_group(self: torch.optim.Optimizer, param_group: dict) -> None:
    """Add parameters with settings of their own, as in any optimizer; `__init__` comes here, too.

    Args:
        param_group: As for any optimizer.

    Raises:
        ValueError: Parameters that are not BF16 or FP32.
    """
    torch.optim.Optimizer.add_param_group(self, param_group)
    for parameter in self.param_groups[-1]["params"]:
        if parameter.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                "Parameters must be BF16 (or FP32, for those that were kept), but one is"
                f" {parameter.dtype}. For FP16, keep the weights in FP32 and train with autocast"
                " and a loss scaler."
            )


class StochasticRoundingAdamW(torch.optim.Optimizer):
    """AdamW with BF16 weights and moments, 2 + 4 bytes a parameter, in which small updates count.

    It computes in FP32 and rounds the weights and the second moment stochastically. (The second
    moment moves by about 1/1000 of itself a step, less than BF16's spacing, so it needs this as
    much as the weights. The first moves by a tenth.) For the computation it holds 20 bytes for each
    number of a slice of `slice_size` numbers, and never of the whole model. FP32 parameters are
    stepped as by `torch.optim.AdamW`.

    Args:
        params: Parameters or groups of them, as for any optimizer.
        lr, betas, eps, weight_decay: As for `torch.optim.AdamW`.
        generator: Where the random numbers are from; by default PyTorch's own. Replicas of one
            model that have to stay equal (data parallelism) need generators of equal seeds. It is
            not part of `state_dict()`.
        slice_size: Numbers that a step takes at a time.

    Raises:
        ValueError: A setting out of range, or parameters that are not BF16 or FP32.
    """

    generator = None  # also for what copy and pickle make: they leave it out
    add_param_group = _add_param_group

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        *,
        generator: torch.Generator | None = None,
        slice_size=2**20,
    ):
        super().__init__(params, _settings(lr, betas, eps, weight_decay, slice_size))
        self.generator = generator

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step.

        Args:
            closure: Computes the loss again, as for any optimizer.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = _call(closure)
        for group, parameter, gradient in _with_gradients(self):
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            stored = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
            for *rounded, gradients in _slices(group["slice_size"], *stored, gradient):
                weight, first, second = (tensor.float() for tensor in rounded)
                _adamw(weight, gradients.float(), first, second, group, state["step"])
                if parameter.dtype == torch.bfloat16:
                    rounded[0].copy_(stochastic_round(weight, self.generator))
                    rounded[1].copy_(first)
                    rounded[2].copy_(stochastic_round(second, self.generator))
                # Or they would still be there when the next slice is made.
                del weight, first, second
        return loss


class MasterWeightAdamW(torch.optim.Optimizer):
    """AdamW for BF16 weights that keeps an FP32 copy of them and FP32 moments: 12 bytes a parameter
    of state.

    The copy, `state[parameter]["master"]`, is what is trained: bit for bit as `torch.optim.AdamW`
    would train it on the same gradients. After each step it is rounded into the model. Whoever
    loads other weights into the model has to load this optimizer's state too, or make it anew: the
    next step writes the copy over them. For the computation it holds 8 bytes for each number of a
    slice of `slice_size` numbers. FP32 parameters need no copy and are stepped as by
    `torch.optim.AdamW`.

    Args:
        params: Parameters or groups of them, as for any optimizer.
        lr, betas, eps, weight_decay: As for `torch.optim.AdamW`.
        slice_size: Numbers that a step takes at a time.

    Raises:
        ValueError: A setting out of range, or parameters that are not BF16 or FP32.
    """

    add_param_group = _add_param_group

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *, slice_size=2**20
    ):
        super().__init__(params, _settings(lr, betas, eps, weight_decay, slice_size))

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step.

        Args:
            closure: Computes the loss again, as for any optimizer.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = _call(closure)
        for group, parameter, gradient in _with_gradients(self):
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
                if parameter.dtype == torch.bfloat16:
                    state["master"] = parameter.detach().float()
            state["step"] += 1
            weights = parameter.detach()
            stored = (weights, state.get("master", weights), state["exp_avg"], state["exp_avg_sq"])
            slices = _slices(group["slice_size"], *stored, gradient)
            for weight, master, first, second, gradients in slices:
                _adamw(master, gradients.float(), first, second, group, state["step"])
                if weight.dtype == torch.bfloat16:
                    weight.copy_(master)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over what `state_dict()` returned, in FP32: PyTorch's own would round it to BF16.

        Args:
            state_dict: What `state_dict()` of such an optimizer returned.

        Raises:
            ValueError: The state of another optimizer, or of other groups.
        """
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = state_dict["state"]
        for number, parameter in zip(saved, parameters, strict=False):
            state = states.get(number)
            if parameter.dtype == torch.bfloat16 and state is not None and "master" not in state:
                raise ValueError(
                    "The state has no FP32 copy of the weights: it is another optimizer's."
                )
        super().load_state_dict(state_dict)  # refuses a state of other groups or sizes
        for number, parameter in zip(saved, parameters, strict=True):
            for name, value in states.get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def to_float8(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Store numbers in one byte each, with a scale for each row.

    The scale, a power of two so that it rounds nothing, lifts a row's largest number to the upper
    end of the type's range. What is too small for it becomes zero. A row with an infinity or a NaN
    comes back as NaNs.

    Args:
        x: FP32, BF16 or FP16, `(..., row)`.
        dtype: `torch.float8_e4m3fn` keeps 4 significant bits over a range of 2^17,
            `torch.float8_e5m2` 3 over 2^31.

    Returns:
        The values, FP8 `(..., row)`, and the scales, FP32 `(..., 1)`.

    Raises:
        ValueError: Another dtype.
        TypeError: What is no FP32, BF16 or FP16 tensor with rows.
    """
    if dtype not in _FLOAT8:
        raise ValueError(f"dtype must be {' or '.join(map(str, _FLOAT8))}, but it is {dtype}.")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if not isinstance(x, Tensor) or x.dtype not in dtypes or not x.ndim:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be FP32, BF16 or FP16 with an axis of rows, but it is {found}.")
    if not x.numel():
        return x.to(dtype), torch.ones(*x.shape[:-1], 1, device=x.device)
    rows = x.float() if x.dtype == torch.float16 else x  # FP16 has no room for small scales
    largest = torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True)).float()
    ratio = (largest / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    scale = ratio / torch.frexp(ratio).mantissa  # leaves the power of two
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (rows / scale.to(rows.dtype)).to(dtype), scale


def from_float8(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Turn what `to_float8` stored into numbers to compute with.

    Args:
        values: FP8 `(..., row)`.
        scale: FP32 `(..., 1)`.
        dtype: `torch.bfloat16` or `torch.float32`.

    Returns:
        The numbers, `(..., row)`.

    Raises:
        TypeError: Values that are not FP8.
        ValueError: Another dtype than FP32 or BF16.
    """
    if values.dtype not in _FLOAT8:
        raise TypeError(f"values must be what to_float8 returned, but they are {values.dtype}.")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float32, but it is {dtype}.")
    return values.to(dtype).mul_(scale.to(dtype))


def _adamw(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, group: dict, step: int
) -> None:
    """One step of AdamW (arXiv:1711.05101) on FP32 numbers, in place, by torch.optim.AdamW's
    operations.
    """
    beta1, beta2 = group["betas"]
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    weight.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))


def _slices(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal stretches of several tensors of one shape, as views; all at once where one is not
    contiguous.
    """
    if not all(tensor.is_contiguous() for tensor in tensors):
        return iter([tensors])
    return zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)


def _settings(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, slice_size: int
) -> dict:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be 0 or more, but it is {value}.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers from 0 to below 1, but they are {betas}.")
    if not isinstance(slice_size, int) or slice_size < 1:
        raise ValueError(f"slice_size must be a positive int, but it is {slice_size!r}.")
    return {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "slice_size": slice_size,
    }


def _call(closure):
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _with_gradients(optimizer: torch.optim.Optimizer) -> list[tuple[dict, Tensor, Tensor]]:
    pairs = [
        (group, parameter) for group in optimizer.param_groups for parameter in group["params"]
    ]
    found = [(group, p, p.grad) for group, p in pairs if p.grad is not None]
    if any(gradient.is_sparse for _, _, gradient in found):
        raise RuntimeError("A gradient is sparse: use sparse=False in the embedding.")
    return found
