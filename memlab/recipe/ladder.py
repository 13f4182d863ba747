"""The ladder: its lines, in the order in which they are added, and what a run of it trains."""

import dataclasses
from collections.abc import Iterable

import torch

from ..workloads import gpt
from ..workloads.scale import scale

#: A line of the recipe: the technique that it is taught by, and what it is to shrink.
LADDER = {
    "SDPA": ("compilation_and_fusion", "activations: the scores are never all there"),
    "BF16 autocast": ("mixed_precision", "activations: half the bytes"),
    "fused loss": ("compilation_and_fusion", "the logits: a chunk of tokens at a time"),
    "checkpoints": ("gradient_checkpointing", "activations: a block keeps its input"),
    "fused AdamW": ("in_place", "the step: no second copy of the model"),
    "BF16 weights": ("low_precision", "weights, gradients, state: half the bytes"),
    "8-bit AdamW": ("lean_optimizers", "state: a byte a number"),
    "micro-batches": ("gradient_accumulation", "a block's own activations: one sequence at a time"),
    "optimizer in backward": ("gradient_accumulation", "gradients: one block at a time"),
    "tied, in tiles": ("large_vocabulary", "the head: its gradient once, in BF16"),
    "activations far": ("offloading", "what is kept for backward"),
    "state far": ("offloading", "the optimizer's state"),
    "lean start": ("lean_start", "the FP32 model that was only cast"),
    "blocks far": ("offloading", "weights and gradients of the blocks"),
    "embedding far": ("large_vocabulary", "weight and gradient of the embedding"),
}

#: The rungs, by their last line: each is the one before it and one line more.
RUNGS = {"naive": ()} | {name: tuple(LADDER)[: number + 1] for number, name in enumerate(LADDER)}

ALL = RUNGS["embedding far"]

#: These round. All other lines compute the same numbers as the naive loop.
APPROXIMATE = ("BF16 autocast", "BF16 weights", "8-bit AdamW")
EXACT = tuple(name for name in LADDER if name not in APPROXIMATE)


@dataclasses.dataclass
class Setting:
    """What a run trains, and on how much: what is left out is the ladder's, at the scale of this
    machine.

    Attributes:
        config: the GPT's sizes.
        batch_size: sequences in a step.
        sequence_length: tokens in a sequence.
        micro_batch_size: sequences that go through a block at once; never more than `batch_size`.
        tile_words: words of the vocabulary that have logits at once, for the loss in tiles.
        slice_size: numbers that the optimizer steps at once.
        learning_rate: the optimizer's.
        seed: for the weights and the batches.
        device: where the model is trained.
    """

    config: gpt.GPTConfig | None = None
    batch_size: int | None = None
    sequence_length: int | None = None
    micro_batch_size: int = 1
    tile_words: int | None = None
    slice_size: int | None = None
    learning_rate: float = 3e-4
    seed: int = 0
    device: torch.device | None = None

    def __post_init__(self):
        here = scale()
        self.config = self.config or here.ladder_gpt
        self.batch_size = self.batch_size or here.ladder_batch_size
        self.sequence_length = self.sequence_length or here.sequence_length
        self.device = self.device or here.device

        self.micro_batch_size = min(self.micro_batch_size, self.batch_size)
        self.tile_words = self.tile_words or self.config.hidden // 2
        slices = self.config.parameter_count // here.optimizer_slices
        self.slice_size = self.slice_size or max(2**16, slices)


def check_lines(on: Iterable[str]) -> None:
    """Raise ValueError for names that are no lines of the ladder."""
    if unknown := [name for name in on if name not in LADDER]:
        raise ValueError(f"{unknown[0]!r} is no line of the ladder: {', '.join(LADDER)}.")


def steps_in_backward(on: Iterable[str]) -> bool:
    """Whether backward steps. With the blocks far, so are the gradients that it would free."""
    return "optimizer in backward" in on and "blocks far" not in on
