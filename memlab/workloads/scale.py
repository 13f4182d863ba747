"""The sizes of every experiment, chosen by the device: one notebook runs on a laptop and on an
H200.
"""

import os
from dataclasses import dataclass, replace

import torch

from ..meters.device import has_own_memory, properties, resolve_device
from . import gpt, vit
from .gpt import GPTConfig
from .vit import ViTConfig

GIB = 2**30
NAMES = ("cpu", "t4", "gpu", "large")

# A CUDA device below this runs as a T4. Cards sold as 24 GB report 22 to 24 GiB.
GPU_MEMORY_BYTES = 20 * GIB
# What a T4 reports, less what its driver keeps. The t4 scale plans for this on a larger device too,
# so that MEMLAB_SCALE=t4 gives a T4's sizes anywhere.
T4_MEMORY_BYTES = int(14.5 * GIB)
# The part of the device that a baseline may fill. The rest is for the CUDA context (about 0.5 GiB),
# the libraries' workspaces, fragmentation, and the variants that the course shows to need more than
# a baseline.
USABLE = 0.8


@dataclass(frozen=True)
class Scale:
    """The device and the sizes that fit it.

    `gpt` trains on batches of `batch_size` sequences of `sequence_length` tokens, `vit` on
    `image_batch_size` images. A run of many steps uses the smaller `training_gpt`, for
    `training_steps` steps of `training_batch_size` sequences of its own context length, once with
    each of the `seeds`. `repeats` is how often a step is timed. `ladder_gpt` and
    `ladder_batch_size` are the capstone's, which runs its step dozens of times. `optimizer_slices`
    is into how many pieces an optimizer cuts its step where it can: a GPU needs larger ones to be
    busy. `memory_bytes` is the device's memory, None on the CPU.
    """

    name: str
    device: torch.device
    device_name: str
    memory_bytes: int | None
    gpt: GPTConfig
    batch_size: int
    sequence_length: int
    vit: ViTConfig
    image_batch_size: int
    training_gpt: GPTConfig
    training_batch_size: int
    training_steps: int
    ladder_gpt: GPTConfig
    ladder_batch_size: int
    optimizer_slices: int
    seeds: tuple[int, ...]
    repeats: int

    def __str__(self) -> str:
        memory = "" if self.memory_bytes is None else f", {self.memory_bytes / GIB:.1f} GiB"
        g, v = self.gpt, self.vit
        return (
            f"Scale {self.name} on {self.device}: {self.device_name}{memory}\nGPT:"
            f" {g.parameter_count:,} parameters ({g.layers} layers, {g.hidden} wide, {g.heads}"
            f" heads, vocabulary {g.vocabulary_size:,}); batch {self.batch_size} x sequence"
            f" {self.sequence_length}\nViT: {v.parameter_count:,} parameters ({v.layers} layers,"
            f" {v.hidden} wide, {v.heads} heads, patches of {v.patch_size} x {v.patch_size}); batch"
            f" {self.image_batch_size} x {v.channels} x {v.image_size} x {v.image_size}"
        )


def scale(name: str | None = None) -> Scale:
    """The scale called `name`, else the one that MEMLAB_SCALE names, else the one of this machine's
    device.

    "cpu" where there is no CUDA device (Apple's mps is not supported and runs as cpu), "t4" for a
    CUDA device with less than 20 GiB or without BF16 of its own, "gpu" for all others.

    "large" is chosen by name only: GPT-2 124M, 8 sequences of 1,024 tokens, on whatever device
    there is, so that one geometry can be compared everywhere. On a CPU it needs 16 GiB and takes
    about a minute for each step.

    Raises ValueError for an unknown name and RuntimeError for t4 or gpu where there is no CUDA
    device.
    """
    origin = "scale(name)"
    if name is None:
        name, origin = os.environ.get("MEMLAB_SCALE") or None, "MEMLAB_SCALE"
    if name is not None and name not in NAMES:
        raise ValueError(f"{origin} must be one of {', '.join(NAMES)}, but it is {name!r}.")
    if name == "large":
        base = scale("gpu") if has_own_memory(resolve_device()) else _cpu()
        config = gpt.gpt2_124m()
        sizes = {
            "gpt": config,
            "batch_size": 8,
            "sequence_length": 1024,
            "ladder_gpt": config,
            "ladder_batch_size": 8,
        }
        # On a CPU a step takes minutes.
        repeats = base.repeats if base.memory_bytes else 1
        return replace(base, name=name, **sizes, repeats=repeats)
    device = resolve_device()
    is_gpu = has_own_memory(device)
    if name == "cpu" or (name is None and not is_gpu):
        return _cpu()
    if not is_gpu:
        raise RuntimeError(
            f"{origin} asks for {name}, but PyTorch finds no CUDA device here: "
            "use cpu, or let the device decide."
        )
    gpu = properties(device)
    if name is None:
        name = name_for(gpu["memory_bytes"], gpu["native_bfloat16"])
    return _cuda(name, gpu["memory_bytes"], device, gpu["name"])


def name_for(memory_bytes: int, native_bfloat16: bool) -> str:
    """The scale, "t4" or "gpu", of a CUDA device."""
    return "gpu" if memory_bytes >= GPU_MEMORY_BYTES and native_bfloat16 else "t4"


# What fits. The baseline is the least economical run that the course makes: FP32, naive attention,
# AdamW. At its peak, where the forward pass ends and the backward pass begins, live - the model:
# weights, gradients and two moments, 4 x 4 = 16 bytes a parameter. (The gradients are counted
# although few exist yet: in their place there may be what other variants add, such as
# half-precision copies of the weights); - for each layer and token, 16 x hidden numbers of 4 bytes
# that autograd saves: the input and output of two norms (4), query, key and value (3), the heads'
# output (1), and the MLP's two tensors of 4 (8); - for each layer, the attention weights: batch x
# heads x sequence x sequence numbers; - once, three such tensors more: the scores' gradients on
# their way through softmax and mask; - once, three tensors of the logits' size: the log-softmax,
# its gradient and the logits' gradient. Or the optimizer step is the peak: 16 bytes a parameter,
# and 4 for the temporary copy that AdamW's foreach form makes. On the CPU GPT-2 124M on 8 x 1024
# tokens measured 15,413 MiB; this says 16,977, 10 % more.


def gpt_baseline_bytes(config: GPTConfig, batch_size: int, sequence_length: int) -> int:
    """An upper estimate of a GPT's peak in training: FP32, naive attention, no dropout, AdamW."""
    logits = batch_size * sequence_length * config.vocabulary_size
    return _baseline_bytes(config, batch_size, sequence_length, logits)


def vit_baseline_bytes(config: ViTConfig, batch_size: int) -> int:
    """An upper estimate of a ViT's peak in training: FP32, naive attention, no dropout, AdamW."""
    return _baseline_bytes(config, batch_size, config.sequence_length, batch_size * config.classes)


def _baseline_bytes(
    config: GPTConfig | ViTConfig, batch_size: int, sequence_length: int, logits: int
) -> int:
    saved = 4 * 16 * batch_size * sequence_length * config.hidden
    scores = 4 * batch_size * config.heads * sequence_length**2
    backward = (
        16 * config.parameter_count + config.layers * (saved + scores) + 3 * scores + 3 * 4 * logits
    )
    step = 20 * config.parameter_count
    return max(backward, step)


def gpt_for(memory_bytes: int) -> tuple[GPTConfig, int]:
    """The largest GPT for a device of this memory, and its batch size, a power of two up to 8.

    The geometries of GPT-2 from large to small; one larger than the 124M must fit with a batch of 4
    at least. That is 124M at 24 GiB and on a T4, 350M from 40, 774M from 80, 1558M on an H200.
    Raises ValueError when nothing fits.
    """
    candidates = (
        (gpt.gpt2_1558m(), 4),
        (gpt.gpt2_774m(), 4),
        (gpt.gpt2_350m(), 4),
        (gpt.gpt2_124m(), 1),
        (gpt.small(), 1),
    )
    for config, smallest in candidates:
        for batch_size in _powers_of_two(8, smallest):
            if (
                gpt_baseline_bytes(config, batch_size, config.context_length)
                <= USABLE * memory_bytes
            ):
                return config, batch_size
    raise ValueError(_too_small(memory_bytes))


def vit_for(memory_bytes: int) -> tuple[ViTConfig, int]:
    """The largest ViT for a device of this memory, and its batch size, a power of two up to 256.

    ViT-L/16 when a batch of 32 fits, else ViT-B/16, else a small one; all for the ten digits, in
    one channel. Raises ValueError when nothing fits.
    """
    digits = {"channels": 1, "classes": 10}
    for config, smallest in (
        (vit.vit_l_16(**digits), 32),
        (vit.vit_b_16(**digits), 8),
        (vit.small(), 8),
    ):
        for batch_size in _powers_of_two(256, smallest):
            if vit_baseline_bytes(config, batch_size) <= USABLE * memory_bytes:
                return config, batch_size
    raise ValueError(_too_small(memory_bytes))


def _powers_of_two(largest: int, smallest: int) -> list[int]:
    return [2**power for power in reversed(range(32)) if smallest <= 2**power <= largest]


def _too_small(memory_bytes: int) -> str:
    return (
        f"No model of the course fits a device of {memory_bytes / GIB:.2f} GiB: "
        "use the cpu scale (MEMLAB_SCALE=cpu)."
    )


def _cpu() -> Scale:
    # Measured on two cores, FP32: a step of the GPT takes about 0.2 s, and of its peak of 119 MiB
    # (167 with naive attention) the model's 16 bytes a parameter are 19. In a wider model they
    # would be a larger part.
    config = gpt.small()
    threads = torch.get_num_threads()
    return Scale(
        name="cpu",
        device=torch.device("cpu"),
        device_name=f"{threads} thread{'s' if threads > 1 else ''}",
        memory_bytes=None,
        gpt=config,
        batch_size=8,
        sequence_length=config.context_length,
        vit=vit.small(),
        image_batch_size=32,
        training_gpt=gpt.tiny(),
        training_batch_size=8,
        training_steps=100,
        ladder_gpt=gpt.small(layers=3, vocabulary_size=4096),
        ladder_batch_size=2,
        optimizer_slices=1000,
        seeds=(0, 1, 2),
        repeats=3,
    )


def _cuda(name: str, memory_bytes: int, device: torch.device, device_name: str) -> Scale:
    usable = min(memory_bytes, T4_MEMORY_BYTES) if name == "t4" else memory_bytes
    config, batch_size = gpt_for(usable)
    images, image_batch_size = vit_for(usable)
    return Scale(
        name=name,
        device=device,
        device_name=device_name,
        memory_bytes=memory_bytes,
        gpt=config,
        batch_size=batch_size,
        sequence_length=config.context_length,
        vit=images,
        image_batch_size=image_batch_size,
        training_gpt=gpt.small(),
        training_batch_size=16,
        training_steps=100,
        ladder_gpt=config,
        ladder_batch_size=batch_size,
        optimizer_slices=100,
        seeds=(0, 1, 2),
        repeats=3,
    )
