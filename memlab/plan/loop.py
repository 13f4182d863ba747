"""The loop in a plan's script, and the model that it trains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A model that is to be trained, and how a script makes it.

    Attributes:
        name: what people call it.
        config_source: the expression that gives its configuration.
        auto_class: the class of transformers that builds it.
        sixteen_bits: whether its weights are published in 16 bits.
        parameters: how many numbers it has, shared ones once.
        images: whether it takes images; else tokens.
    """

    name: str
    config_source: str
    auto_class: str
    sixteen_bits: bool
    parameters: int
    images: bool = False


def loop_of(
    model: Model, on: set[str], batch: int, sequence: int, micro_batch: int, sixteen_bits: bool
) -> list[str]:
    """Write the loop itself.

    Args:
        model: the model.
        on: the switches that are on.
        batch: rows in a step.
        sequence: tokens in a row; of no meaning for images.
        micro_batch: rows that go through the model at once, if "micro-batches" is on.
        sixteen_bits: whether the model computes in BF16 itself.

    Returns:
        Its lines.
    """
    lines = ["while True:", "    # Yours: the next batch of your data."]
    lines += [f"    {line}" for line in _batch(model, batch, sequence, sixteen_bits)]
    forward = "model(**batch).loss"
    if "micro-batches" in on and "optimizer in backward" not in on:
        return [
            *lines,
            f"    micro_batches = split_batch(batch, {micro_batch})",
            *_accumulated(model, "activation offloading" in on),
            "    optimizer.step()",
            "    model.zero_grad()",
            "    yield loss",
        ]
    if "activation offloading" in on:
        lines += ["    with far:", f"        loss = {forward}"]
    else:
        lines += [f"    loss = {forward}"]
    lines += ["    loss.backward()", "    optimizer.step()", "    model.zero_grad()"]
    return [*lines, "    yield loss.detach()", "    del loss"]


def _accumulated(model: Model, far: bool) -> list[str]:
    # Hugging Face's causal models shift the labels.
    count = "torch.tensor(len(labels))" if model.images else "(labels[:, 1:] != -100).sum()"
    lines = ["", "    def mean_loss(**micro_batch):"]
    if far:
        lines += ["        with far:", "            return model(**micro_batch).loss"]
    else:
        lines += ["        return model(**micro_batch).loss"]
    return [
        *lines,
        "",
        "    def count(labels, **others):",
        f"        return {count}",
        "",
        "    loss = accumulate_gradients(mean_loss, micro_batches, count)",
    ]


def _batch(model: Model, batch: int, sequence: int, sixteen_bits: bool) -> list[str]:
    if model.images:
        size = f"({batch}, config.num_channels, config.image_size, config.image_size)"
        dtype = "bfloat16" if sixteen_bits else "float32"
        return [
            f'images = torch.randn({size}, dtype=torch.{dtype}, device="cuda")',
            f'labels = torch.randint(config.num_labels, ({batch},), device="cuda")',
            'batch = {"pixel_values": images, "labels": labels}',
        ]
    return [
        f'tokens = torch.randint(config.vocab_size, ({batch}, {sequence}), device="cuda")',
        'batch = {"input_ids": tokens, "labels": tokens}',
    ]
