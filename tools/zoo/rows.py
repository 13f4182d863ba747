"""The rows of the zoo: each a model, trained in one of several ways."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlab.techniques.compilation_and_fusion import apply_fused_loss
from memlab.techniques.gradient_accumulation import accumulate_gradients, optimizer_in_backward
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing
from memlab.techniques.lean_optimizers import AdamW8bit, Apollo, Lion
from tools.zoo.models import Animal, animals, loss_of


class Way(NamedTuple):
    """A way to train a model.

    Attributes:
        name: in words.
        optimizer: from parameters to the optimizer.
        dtype: of the weights.
        autocast: whether the forward runs under CPU autocast in BF16.
        prepare: what is done to the model before the optimizer is made; it may return another one.
        micro_batches: how many a step has.
        in_backward: whether backward steps each parameter.
        clip: whether gradients are clipped.
    """

    name: str
    optimizer: Callable = torch.optim.AdamW
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    prepare: Callable[[nn.Module], nn.Module | None] | None = None
    micro_batches: int = 1
    in_backward: bool = False
    clip: bool = False


class Row(NamedTuple):
    animal: Animal
    way: Way

    @property
    def name(self) -> str:
        return f"{self.animal.name} · {self.way.name}"


# What is done to a model --------------------------------------------------------------------------


def checkpoint_blocks(model: nn.Module) -> None:
    """Hugging Face's own switch, which is `torch.utils.checkpoint`."""
    model.gradient_checkpointing_enable()


def our_checkpoints(model: nn.Module) -> None:
    apply_gradient_checkpointing(model)


def our_loss(model: nn.Module) -> None:
    apply_fused_loss(model)


def adapters(model: nn.Module) -> nn.Module:
    """LoRA at all linear layers (PEFT)."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))


def frozen_but_the_head(model: nn.Module) -> None:
    """All parameters frozen but the last two."""
    for parameter in list(model.parameters())[:-2]:
        parameter.requires_grad_(False)


# The ways -----------------------------------------------------------------------------------------

ADAMW = torch.optim.AdamW
MOMENTUM = functools.partial(torch.optim.SGD, momentum=0.9)

PLAIN = Way("AdamW")
EVERYWHERE = [
    PLAIN,
    Way("SGD with momentum, clipped", MOMENTUM, clip=True),
    Way("AdamW, BF16 autocast", autocast=True),
]
CHECKPOINTS = Way("AdamW, checkpoints", prepare=checkpoint_blocks)
LORA = Way("AdamW, LoRA", prepare=adapters)
OPTIMIZERS = [
    Way("AdamW, foreach", functools.partial(ADAMW, foreach=True)),
    Way("AdamW, fused", functools.partial(ADAMW, fused=True)),
    Way("SGD", torch.optim.SGD),
    Way("SGD with momentum, foreach", functools.partial(MOMENTUM, foreach=True)),
    Way("Adam with AMSGrad", functools.partial(torch.optim.Adam, amsgrad=True)),
    Way("Adafactor", torch.optim.Adafactor),
    Way("Adafactor, foreach", functools.partial(torch.optim.Adafactor, foreach=True)),
    Way("RMSprop", torch.optim.RMSprop),
    Way("Adagrad", torch.optim.Adagrad),
    Way("NAdam", torch.optim.NAdam),
    Way("our AdamW in 8 bits", AdamW8bit),
    Way("our Lion", Lion),
    Way("our Apollo", functools.partial(Apollo, rank=4)),
    Way("our AdamW in 8 bits, BF16 weights", AdamW8bit, dtype=torch.bfloat16),
    Way("AdamW, foreach, BF16 weights", functools.partial(ADAMW, foreach=True),
        dtype=torch.bfloat16),
]  # fmt: skip
TECHNIQUES = [
    Way("AdamW, BF16 weights", dtype=torch.bfloat16),
    Way("AdamW, our checkpoints", prepare=our_checkpoints),
    Way("AdamW, our checkpoints, BF16 autocast", prepare=our_checkpoints, autocast=True),
    Way("AdamW, micro-batches", micro_batches=2),
    Way("AdamW in backward", in_backward=True),
    Way("AdamW in backward, BF16 weights", in_backward=True, dtype=torch.bfloat16),
    Way("AdamW, all frozen but the head", prepare=frozen_but_the_head),
]
LOSSES = [
    Way("AdamW, our fused loss", prepare=our_loss),
    Way("AdamW, our fused loss, BF16 autocast", prepare=our_loss, autocast=True),
]

#: These differ from another one in what they read, or little.
WITH_ADAMW_ONLY = (
    "GPT-2, padded",
    "Llama, padded",
    "Llama, eager attention",
    "BERT, padded",
    "BERT, classes",
    "Phi-3",
    "RoBERTa",
    "ELECTRA",
)

#: Hugging Face's models that have no switch for checkpoints, and those that PEFT refuses.
WITHOUT_CHECKPOINTS = ("ALBERT", "ConvNeXt", "ResNet", "MobileNet V2", "RegNet")
WITHOUT_ADAPTERS = ("Mamba",)

#: The models that are trained with every optimizer and every technique of ours.
WITH_ALL = ("our GPT",)
WITH_FUSED_LOSS = ("Llama", "our GPT", "GPT-2")
WITH_TECHNIQUES = (*WITH_ALL, "GPT-2", "Llama", "ViT")


def ways_of(animal: Animal) -> list[Way]:
    """How this model is trained."""
    if animal.name in WITH_ADAMW_ONLY:
        return [PLAIN]
    ways = list(EVERYWHERE)
    if animal.library == "transformers":
        ways += [CHECKPOINTS] * (animal.name not in WITHOUT_CHECKPOINTS)
        ways += [LORA] * (animal.name not in WITHOUT_ADAPTERS)
    if animal.name in WITH_ALL:
        ways += OPTIMIZERS
    if animal.name in WITH_TECHNIQUES:
        ways += TECHNIQUES
    if animal.name in WITH_FUSED_LOSS:
        ways += LOSSES
    return ways


def rows() -> list[Row]:
    """All rows of the zoo."""
    return [Row(animal, way) for animal in animals() for way in ways_of(animal)]


def rows_with(words: Sequence[str]) -> list[Row]:
    """The rows whose name holds one of some words; all rows without any."""
    return [row for row in rows() if not words or any(word in row.name for word in words)]


# Training -----------------------------------------------------------------------------------------


def training(row: Row) -> Callable[[], Iterator[Tensor]]:
    """The run of a row, for `memlab.measure` and for `memlab.predict`."""
    animal, way = row

    def train() -> Iterator[Tensor]:
        torch.manual_seed(0)
        model = animal.make().to(way.dtype)
        if way.prepare is not None:
            model = way.prepare(model) or model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if way.in_backward:
            optimizer = optimizer_in_backward(model, lambda group: way.optimizer(group, lr=1e-3))
        else:
            optimizer = way.optimizer(trained, lr=1e-3)
        while True:
            batch = _of_type(animal.batch(), way.dtype)
            loss = _backward(model, batch, way)
            if way.clip:
                nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if not way.in_backward:
                optimizer.zero_grad()
            yield loss

    return train


def _backward(model: nn.Module, batch: dict[str, Tensor], way: Way) -> Tensor:
    def mean_loss(**micro_batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=way.autocast):
            return loss_of(model, micro_batch)

    if way.micro_batches == 1:
        loss = mean_loss(**batch)
        loss.backward()
        return loss
    size = len(next(iter(batch.values()))) // way.micro_batches
    pieces = [
        {name: value[start : start + size] for name, value in batch.items()}
        for start in range(0, way.micro_batches * size, size)
    ]
    return accumulate_gradients(mean_loss, pieces, lambda **piece: size)


def _of_type(batch: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """A batch with its numbers in the type of the weights; words and classes stay as they are."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def versions() -> dict[str, str]:
    """The libraries that the models are from."""
    import transformers

    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
