"""Training runs that many lessons measure: plain loops over this room's models.

Each is a generator function, which `memlab.measure` takes with its options:

>>> measure(train_gpt)
>>> measure(train_gpt, apply=[apply_gradient_checkpointing], batch_size=4)

What comes before the first `yield` builds, and each `yield` ends a step. A technique comes in from
outside: `apply` has the functions that are applied to the model before the optimizer is made.

What is left out is what the device's `scale` says.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import images, text
from .gpt import GPT, GPTConfig
from .scale import scale
from .vit import ViT, ViTConfig


def train_gpt(
    *,
    config: GPTConfig | None = None,
    data: np.ndarray | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    apply: Sequence[Callable[[nn.Module], object]] = (),
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    learning_rate: float = 1e-3,
    seed: int = 0,
    first_batch: int = 0,
    same_batch: bool = True,
) -> Iterator[Tensor]:
    """Train a GPT.

    Args:
        config: the model's sizes.
        data: the text, as `workloads.text` has it; by default the prose.
        batch_size: sequences in a step.
        sequence_length: tokens in a sequence.
        apply: what is applied to the model, in this order.
        make_optimizer: called with the parameters and `lr`.
        learning_rate: the optimizer's.
        seed: of the weights.
        first_batch: the number (the seed) of the first batch.
        same_batch: whether all steps have the first batch; otherwise each has the next one.

    Yields:
        The loss of each step, a scalar.
    """
    here = scale()
    data = _prose() if data is None else data
    torch.manual_seed(seed)
    model = GPT(config or here.gpt).to(here.device)
    for change in apply:
        change(model)
    optimizer = make_optimizer(model.parameters(), lr=learning_rate)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        return text.batch(
            data,
            batch_size or here.batch_size,
            sequence_length or here.sequence_length,
            seed=number,
            device=here.device,
        )

    tokens, targets = batch(first_batch)
    for following in itertools.count(first_batch + 1):
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()

        # The loss would still be there while the next one is computed.
        del loss
        if not same_batch:
            tokens, targets = batch(following)


def train_vit(
    data: images.Split,
    *,
    config: ViTConfig | None = None,
    batch_size: int | None = None,
    apply: Sequence[Callable[[nn.Module], object]] = (),
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Train a Vision Transformer on one batch of images.

    Args:
        data: images and labels, as `images.load(size).train` has them. They are loaded before the
            run: they are in memory, and would be measured with it.
        config: the model's sizes.
        batch_size: images in a step.
        apply: what is applied to the model, in this order.
        make_optimizer: called with the parameters and `lr`.
        learning_rate: the optimizer's.
        seed: of the weights.

    Yields:
        The loss of each step, a scalar.
    """
    here = scale()
    torch.manual_seed(seed)
    model = ViT(config or here.vit).to(here.device)
    for change in apply:
        change(model)
    optimizer = make_optimizer(model.parameters(), lr=learning_rate)
    pixels, labels = images.batch(
        data, batch_size or here.image_batch_size, seed=0, device=here.device
    )

    while True:
        loss = model(pixels, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()
        del loss


def train_mlp(
    width: int,
    *,
    rows: int,
    apply: Sequence[Callable[[nn.Module], object]] = (),
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Train two linear layers with a GELU between, four times as wide inside, on random numbers.

    Args:
        width: numbers in a row.
        rows: rows in a batch.
        apply: what is applied to the model, in this order.
        make_optimizer: called with the parameters and `lr`.
        learning_rate: the optimizer's.
        seed: of the weights and the rows.

    Yields:
        The mean squared error of each step, a scalar.
    """
    here = scale()
    torch.manual_seed(seed)
    layers = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    model = nn.Sequential(*layers).to(here.device)
    for change in apply:
        change(model)
    optimizer = make_optimizer(model.parameters(), lr=learning_rate)
    inputs = torch.randn(rows, width, device=here.device)
    targets = torch.randn(rows, width, device=here.device)

    while True:
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()
        del loss


@functools.cache
def _prose() -> np.ndarray:
    return text.load("prose").train
