"""The script of a plan: an ordinary training loop with some switches on, as text.

What is predicted is this text, executed. So the lines that a plan prints are those it speaks of.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

#: What each switch needs, by the module under memlab.techniques.
_IMPORTS = {
    "fused loss": ("compilation_and_fusion", ["apply_fused_loss"]),
    "BF16 autocast": ("mixed_precision", ["apply_mixed_precision"]),
    "checkpoints": ("gradient_checkpointing", ["apply_gradient_checkpointing"]),
    "BF16 weights": ("low_precision", ["StochasticRoundingAdamW"]),
    "8-bit AdamW": ("lean_optimizers", ["AdamW8bit"]),
    "micro-batches": ("gradient_accumulation", ["accumulate_gradients", "split_batch"]),
    "optimizer in backward": ("gradient_accumulation", ["optimizer_in_backward"]),
    "activations far": ("offloading", ["offload_activations"]),
    "state far": ("offloading", ["offload_optimizer_state"]),
}

#: Parameters from which on a model is large.
_LARGE = 10**9


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


def script_of(
    model: Model,
    switches: Collection[str],
    batch: int,
    sequence: int,
    micro_batch: int = 1,
    lora: int | None = None,
) -> str:
    """Write the training loop of a model with some switches on.

    Args:
        model: the model.
        switches: names in `SWITCHES`.
        batch: rows in a step.
        sequence: tokens in a row; of no meaning for images.
        micro_batch: rows that go through the model at once, if "micro-batches" is on.
        lora: the adapters' rank; None trains the whole model.

    Returns:
        Python source with a function `train`, a run.
    """
    on = set(switches)
    lines = _imports(model, on, lora)
    lines += ["", "", *_optimizer(on, model)]
    lines += ["", "", "def train():", *_indented(_model(model, on, micro_batch, lora))]
    lines += ["", *_indented(_attached(on))]
    lines += ["", *_indented(_loop(model, on, batch, sequence, micro_batch))]
    lines += ["", "", 'if __name__ == "__main__":', "    for loss in train():"]
    lines += ["        print(float(loss))", ""]
    return "\n".join(lines)


def _imports(model: Model, on: set[str], lora: int | None) -> list[str]:
    modules: dict[str, list[str]] = {}
    for switch in sorted(on & _IMPORTS.keys()):
        module, names = _IMPORTS[switch]
        modules.setdefault(module, []).extend(names)
    if {"micro-batches", "optimizer in backward"} <= on:
        # One or the other: gradients that are stepped at once cannot be added up.
        modules.pop("gradient_checkpointing", None)
        modules["gradient_accumulation"] = [
            "apply_layer_major_micro_batches",
            "optimizer_in_backward",
        ]
    if "BF16 weights" in on:
        modules.pop("mixed_precision", None)
    if "8-bit AdamW" in on:
        modules.pop("low_precision", None)
        modules["low_precision"] = ["stochastic_round"] if _sixteen_bits(model, on) else []
        if "state far" in on:
            modules["offloading"].remove("offload_optimizer_state")
            modules["offloading"].append("far_zeros")
    from_memlab = model.config_source.startswith("hugging_face_config")
    names = model.auto_class if from_memlab else f"AutoConfig, {model.auto_class}"
    lines = ["import torch", f"from transformers import {names}"]
    if lora is not None:
        lines.insert(1, "from peft import LoraConfig, get_peft_model")
    lines.append("")
    for module in sorted(modules):
        if modules[module]:
            names = ", ".join(sorted(modules[module], key=str.lower))
            lines.append(f"from memlab.techniques.{module} import {names}")
    if from_memlab:
        lines.append("from memlab.workloads.geometries import hugging_face_config")
    return lines if lines[-1] else lines[:-1]


def _sixteen_bits(model: Model, on: set[str]) -> bool:
    return model.sixteen_bits or "BF16 weights" in on


def _optimizer(on: set[str], model: Model) -> list[str]:
    lines = ["def make_optimizer(parameters):"]
    # Of a large model larger slices: a step has fewer of them, at 20 bytes a number of one slice.
    slices = ["slice_size=2**24"] if model.parameters > _LARGE else []
    if "8-bit AdamW" in on:
        options = ["lr=1e-5", *slices]
        if _sixteen_bits(model, on):
            options.append("rounding=stochastic_round")
        if "state far" in on:
            options.append("zeros=far_zeros")
        return [*lines, f"    return AdamW8bit(parameters, {', '.join(options)})"]
    if "BF16 weights" in on:
        options = ["lr=1e-5", *slices]
        made = f"StochasticRoundingAdamW(parameters, {', '.join(options)})"
    else:
        fused = ", fused=True" if "fused AdamW" in on else ""
        made = f"torch.optim.AdamW(parameters, lr=1e-5{fused})"
    if "state far" not in on:
        return [*lines, f"    return {made}"]
    return [
        *lines,
        f"    optimizer = {made}",
        "    offload_optimizer_state(optimizer)",
        "    return optimizer",
    ]


def _model(model: Model, on: set[str], micro_batch: int, lora: int | None) -> list[str]:
    dtype = "bfloat16" if _sixteen_bits(model, on) else "float32"
    made = f"{model.auto_class}.from_config(config, dtype=torch.{dtype})"
    lines = [
        f"config = {model.config_source}",
        f"# With your weights: {model.auto_class}.from_pretrained(..., dtype=torch.{dtype})",
        f'model = {made}.to("cuda").train()',
    ]
    if not model.images:
        lines.append("model.config.use_cache = False")
    if lora is not None:
        lines.append(f'adapters = LoraConfig(r={lora}, target_modules="all-linear")')
        lines.append("model = get_peft_model(model, adapters)")
    if "BF16 autocast" in on and "BF16 weights" not in on:
        cache = ", cache_weights=False" if "checkpoints" in on else ""
        lines.append(f"apply_mixed_precision(model, torch.bfloat16{cache})")
    layer_major = {"micro-batches", "optimizer in backward"} <= on
    if "checkpoints" in on and not layer_major:
        lines.append("apply_gradient_checkpointing(model)")
    if layer_major:
        lines.append("# Each block is computed again in backward, one micro-batch at a time.")
        lines.append(f"apply_layer_major_micro_batches(model, {micro_batch})")
    if "fused loss" in on:
        lines.append("apply_fused_loss(model)")
    return lines


def _attached(on: set[str]) -> list[str]:
    lines = []
    if "optimizer in backward" in on:
        lines.append("optimizer = optimizer_in_backward(model, make_optimizer)")
    else:
        lines.append("trained = [p for p in model.parameters() if p.requires_grad]")
        lines.append("optimizer = make_optimizer(trained)")
    if "activations far" in on:
        lines.append("far = offload_activations(model)")
    return lines


def _loop(model: Model, on: set[str], batch: int, sequence: int, micro_batch: int) -> list[str]:
    lines = ["while True:", "    # Yours: the next batch of your data."]
    lines += [f"    {line}" for line in _batch(model, on, batch, sequence)]
    forward = "model(**batch).loss"
    if "micro-batches" in on and "optimizer in backward" not in on:
        return [
            *lines,
            f"    micro_batches = split_batch(batch, {micro_batch})",
            *_accumulated(model, "activations far" in on),
            "    optimizer.step()",
            "    model.zero_grad()",
            "    yield loss",
        ]
    if "activations far" in on:
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


def _batch(model: Model, on: set[str], batch: int, sequence: int) -> list[str]:
    if model.images:
        size = f"({batch}, config.num_channels, config.image_size, config.image_size)"
        dtype = "bfloat16" if _sixteen_bits(model, on) else "float32"
        return [
            f'images = torch.randn({size}, dtype=torch.{dtype}, device="cuda")',
            f'labels = torch.randint(config.num_labels, ({batch},), device="cuda")',
            'batch = {"pixel_values": images, "labels": labels}',
        ]
    return [
        f'tokens = torch.randint(config.vocab_size, ({batch}, {sequence}), device="cuda")',
        'batch = {"input_ids": tokens, "labels": tokens}',
    ]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" if line else "" for line in lines]
