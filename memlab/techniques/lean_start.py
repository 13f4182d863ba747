"""A lean start: meta-device initialisation, which never holds a second copy of the model.

A model that is built in FP32 and then cast was there in FP32. On the meta device a tensor has a
shape and a dtype, and no memory: so a model is built there, cast there, and `materialize` then
makes its tensors one after the other, each in its type and in its place.

Source: "Tips for loading an nn.Module from a checkpoint",
https://docs.pytorch.org/tutorials/recipes/recipes/module_load_state_dict_tips.html.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def materialize(
    model: nn.Module, state: Mapping[str, Tensor], place: Callable[[str, Tensor], Tensor]
) -> None:
    """Give a model on the meta device its numbers, one tensor after the other: never more than one
    is there twice.

    >>> with torch.device("meta"):
    ...     model = GPT(config).to(torch.bfloat16)  # no memory yet
    >>> state = torch.load("weights.pt", mmap=True)  # stays in the file
    >>> materialize(model, state, lambda name, like: torch.empty_like(like, device="cuda"))

    Args:
        model: A model whose parameters and buffers are all on the meta device.
        state: Numbers by name, as `state_dict()` has them; they are converted as they are copied.
        place: From a name and the meta tensor of that name to a tensor of its shape and dtype,
            where it shall lie.

    Raises:
        ValueError: A model that is not on the meta device, a name that the state lacks (a buffer
            that is not saved, for one), or another shape.
        TypeError: `model` is no module, or `place` returned another shape or dtype.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    named = [*model.named_parameters(), *model.named_buffers()]
    _check_state(named, state)
    made = {}
    for name, meta in named:
        tensor = place(name, meta)
        _check_place(name, meta, tensor)
        tensor.copy_(state[name])
        if isinstance(meta, nn.Parameter):
            tensor = nn.Parameter(tensor, meta.requires_grad)
        made[id(meta)] = tensor

    # A shared parameter has several places, also within one module, and stays shared.
    every = {"recurse": False, "remove_duplicate": False}
    for module in model.modules():
        for name, meta in [*module.named_parameters(**every), *module.named_buffers(**every)]:
            setattr(module, name, made[id(meta)])


def _check_state(named: list[tuple[str, Tensor]], state: Mapping[str, Tensor]) -> None:
    for name, meta in named:
        if not meta.is_meta:
            raise ValueError(
                f"{name} has numbers already: make the model inside `with torch.device('meta')`."
            )
    for name, meta in named:
        if name not in state:
            raise ValueError(
                f"The state has no {name}. If it is a buffer that is never saved, add it to the"
                " state."
            )
        # Asked for once: a state may read it from a file.
        shape = state[name].shape
        if shape != meta.shape:
            raise ValueError(
                f"In the state {name} is {tuple(shape)}, but the model needs {tuple(meta.shape)}."
            )


def _check_place(name: str, meta: Tensor, tensor: Tensor) -> None:
    fits = isinstance(tensor, Tensor) and not tensor.is_meta
    if not fits or tensor.shape != meta.shape or tensor.dtype != meta.dtype:
        raise TypeError(
            f"place must return {tuple(meta.shape)}, {meta.dtype} for {name}, not {tensor!r:.60}."
        )
