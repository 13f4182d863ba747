"""The recipe's loop: how the model starts, what is applied to it, the optimizer, and the step.

Five lines are replaced by a later one:
- BF16 weights replace autocast. They also replace the fused AdamW, for they need an optimizer that
  rounds at random; 8-bit AdamW then replaces that one.
- The loss in tiles replaces the fused loss.
- Micro-batches replace the checkpoints: each micro-batch is checkpointed by itself.
- With the blocks far their gradients are far too: an optimizer in backward has nothing to free.
"""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..techniques.compilation_and_fusion import apply_fused_loss
from ..techniques.gradient_accumulation import (
    apply_layer_major_micro_batches,
    optimizer_in_backward,
)
from ..techniques.gradient_checkpointing import apply_gradient_checkpointing
from ..techniques.large_vocabulary import apply_tied_embedding, tiled_linear_cross_entropy
from ..techniques.lean_optimizers import AdamW8bit
from ..techniques.lean_start import materialize
from ..techniques.low_precision import (
    StochasticRoundingAdamW,
    cast_to_low_precision,
    stochastic_round,
)
from ..techniques.mixed_precision import apply_mixed_precision
from ..techniques.offloading import (
    far_like,
    far_zeros,
    offload_activations,
    offload_optimizer_state,
    stream_parameters,
)
from ..workloads import gpt, text
from .ladder import Setting, check_lines, steps_in_backward

#: Bytes: what is smaller never goes to the far side.
SMALL = 2**14


def training(
    *on: str, setting: Setting | None = None, optimizer_of: Callable | None = None
) -> Callable:
    """Return a training run, to be measured or trained, with these lines of the ladder switched on.

    Args:
        on: names in `LADDER`, in any order; none is the naive loop.
        setting: what is trained, and on how much.
        optimizer_of: makes the optimizer, with the arguments of `make_optimizer`, which it is by
            default.

    Returns:
        A generator function: it builds everything, and yields the loss after each step.

    Raises:
        ValueError: a name is not in `LADDER`.
    """
    check_lines(on)
    setting = setting or Setting()
    corpus = text.load("prose")

    if "lean start" in on:
        # Written before anything is measured.
        weights_file(setting.config, setting.seed)

    def train():
        model = start(on, setting)
        apply_techniques(model, on, setting)
        optimizer = attach_optimizer(model, on, setting, optimizer_of or make_optimizer)
        activations = contextlib.nullcontext()
        if "activations far" in on:
            activations = offload_activations(model, min_bytes=SMALL)

        for number in itertools.count(1000 * setting.seed):
            tokens, targets = text.batch(
                corpus.train,
                setting.batch_size,
                setting.sequence_length,
                seed=number,
                device=setting.device,
            )
            with activations:
                loss = model(tokens, targets)
            loss.backward()
            optimizer.step()
            model.zero_grad()
            yield loss.detach()

            # Or it would still be there while the next one is computed.
            del loss

    return train


# --- How the model starts -------------------------------------------------------------------------


def start(on: Iterable[str], setting: Setting) -> gpt.GPT:
    """Return the model with its weights, from the setting's seed, in their type and place.

    A model that is built in FP32 and cast was there in FP32. The lean start builds it on the meta
    device, where tensors have no memory, and makes one tensor after the other from a file.
    """
    attention = "sdpa" if "SDPA" in on else "naive"
    config = dataclasses.replace(setting.config, attention=attention)

    if "lean start" not in on:
        torch.manual_seed(setting.seed)
        model = gpt.GPT(config).to(setting.device)
        if "BF16 weights" in on:
            cast_to_low_precision(model)
        if "embedding far" in on:
            weight = model.token_embedding.weight
            weight.data = far_like(weight).copy_(weight.detach())
        return model

    with torch.device("meta"):
        model = gpt.GPT(config)
        if "BF16 weights" in on:
            model.to(torch.bfloat16)

    def place(name: str, like: Tensor) -> Tensor:
        far_block = name.startswith("blocks.") and "blocks far" in on and like.nbytes >= SMALL
        far_embedding = name.startswith("token_embedding.") and "embedding far" in on
        if far_block or far_embedding:
            return far_like(like, device=setting.device)
        return torch.empty_like(like, device=setting.device)

    state = torch.load(weights_file(setting.config, setting.seed), mmap=True)
    materialize(model, state, place)
    return model


@functools.cache
def weights_file(config: gpt.GPTConfig, seed: int) -> str:
    """Return the path of a file with the weights that this seed gives a GPT; written once.

    Whoever fine-tunes has such a file. Here all runs are to start from the same weights.
    """
    torch.manual_seed(seed)
    path = Path(_folder().name) / f"{len(list(Path(_folder().name).iterdir()))}.pt"
    torch.save(gpt.GPT(config).state_dict(), path)
    return str(path)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="memlab-recipe-")


# --- What is applied to it ------------------------------------------------------------------------


def apply_techniques(model: gpt.GPT, on: Iterable[str], setting: Setting) -> None:
    """Apply the lines of the ladder that change how the model computes.

    What replaces a block's `forward` is wrapped by what is applied after it. So the parameters are
    streamed inside the checkpoint: the recomputation brings them near again.
    """
    if "BF16 autocast" in on and "BF16 weights" not in on:
        apply_mixed_precision(model, torch.bfloat16, cache_weights="checkpoints" not in on)

    if "blocks far" in on:
        stream_parameters(model.blocks, min_bytes=SMALL, device=setting.device)

    if "micro-batches" in on:
        apply_layer_major_micro_batches(model, setting.micro_batch_size)
    elif "checkpoints" in on:
        apply_gradient_checkpointing(model)

    if "tied, in tiles" in on:
        apply_tied_embedding(model)
        gradient_like = torch.empty_like
        if "embedding far" in on:
            gradient_like = functools.partial(far_like, device=setting.device)
        loss_in_tiles = functools.partial(
            tiled_linear_cross_entropy,
            tile_words=setting.tile_words,
            gradient_like=gradient_like,
        )
        apply_fused_loss(model, loss=loss_in_tiles)
    elif "fused loss" in on:
        apply_fused_loss(model, chunk_tokens=128)


# --- The optimizer --------------------------------------------------------------------------------


def attach_optimizer(model: nn.Module, on: Iterable[str], setting: Setting, make: Callable):
    """Return what `step()` is called on: one optimizer, or one for each parameter, in backward."""
    make_of = functools.partial(make, on, setting)
    if steps_in_backward(on):
        return optimizer_in_backward(model, make_of)
    return make_of(model.parameters())


def make_optimizer(
    on: Iterable[str], setting: Setting, parameters: Iterable[Tensor]
) -> torch.optim.Optimizer:
    """Return one of the three AdamWs for some parameters; its state is born where it stays."""
    if "8-bit AdamW" in on:
        return AdamW8bit(
            parameters,
            lr=setting.learning_rate,
            slice_size=setting.slice_size,
            rounding=stochastic_round if "BF16 weights" in on else None,
            zeros=far_zeros_of(setting.device) if "state far" in on else torch.zeros,
            device=setting.device,
        )

    if "BF16 weights" in on:
        optimizer = StochasticRoundingAdamW(
            parameters, lr=setting.learning_rate, slice_size=setting.slice_size
        )
    else:
        # Foreach is what PyTorch chooses on a GPU, by itself not on a CPU.
        fused = "fused AdamW" in on
        optimizer = torch.optim.AdamW(
            parameters, lr=setting.learning_rate, fused=fused, foreach=not fused
        )
    if "state far" in on:
        offload_optimizer_state(optimizer, min_bytes=SMALL)
    return optimizer


def far_zeros_of(near: torch.device) -> Callable[..., Tensor]:
    """Return a `torch.zeros` for the far side of this device, also for parameters that are far."""

    def zeros(*size, dtype: torch.dtype | None = None, device=None) -> Tensor:
        return far_zeros(*size, dtype=dtype, device=near)

    return zeros
