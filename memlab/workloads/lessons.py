"""What the lessons train: a GPT of GPT-2's shape, small on a CPU and GPT-2 itself on a GPU.

A small model is a good stand-in only if the same tensors are large in it. So the small one has as
many vocabulary entries beside its width as GPT-2 (64 and 65 times the width), as many layers, and
as many attention scores beside a token's other activations (heads x sequence / hidden is 16 in
both).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..meters.device import resolve_device
from .gpt import GPTConfig, gpt2_124m
from .scale import scale


@dataclass(frozen=True)
class Size:
    """A model, and the batch of a step.

    Attributes:
        name: what it is called.
        config: the model's sizes.
        batch: sequences in a step.
        sequence: tokens in a sequence.
        repeats: how often a step is timed. None on a CPU: its seconds say nothing of a GPU's.
    """

    name: str
    config: GPTConfig
    batch: int
    sequence: int
    repeats: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.sequence

    def __str__(self) -> str:
        config = self.config
        return (
            f"{self.name}: {config.parameter_count:,} parameters, {config.layers} layers,"
            f" {config.hidden} wide, {config.vocabulary_size:,} vocabulary entries; a step has"
            f" {self.batch} x {self.sequence:,} tokens"
        )


SMALL = Size("a small GPT", GPTConfig(8192, 256, layers=12, heads=8, hidden=128), 4, 256)
GPT2_124M = Size("GPT-2 124M", gpt2_124m(), 8, 1024, repeats=5)
#: For a GPU with less than 20 GiB.
GPT2_124M_IN_SHORT = Size("GPT-2 124M", gpt2_124m(), 2, 1024, repeats=5)


def size() -> Size:
    """Return what this machine's device trains in the lessons."""
    return {"cpu": SMALL, "t4": GPT2_124M_IN_SHORT}.get(scale().name, GPT2_124M)


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU; in a prediction, the GPU that is predicted."""
    return resolve_device()


def random_batch(of: Size) -> tuple[Tensor, Tensor]:
    """Return random tokens and their targets, each `(batch, sequence)`, on the device.

    What the tokens are changes no byte.
    """
    shape = (of.batch, of.sequence + 1)
    tokens = torch.randint(of.config.vocabulary_size, shape, device=device())
    return tokens[:, :-1], tokens[:, 1:]
