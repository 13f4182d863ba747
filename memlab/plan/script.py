"""The script of a plan: an ordinary training loop with some switches on, as text.

What is predicted is this text, executed. So the lines that a plan prints are those it speaks of.
"""

from __future__ import annotations

from collections.abc import Collection

from .loop import Model, loop_of

#: What each switch needs, by the module under memlab.techniques.
_IMPORTS = {
    "fused loss": ("compilation_and_fusion", ["apply_fused_loss"]),
    "BF16 autocast": ("mixed_precision", ["apply_mixed_precision"]),
    "checkpoints": ("gradient_checkpointing", ["apply_gradient_checkpointing"]),
    "BF16 weights": ("low_precision", ["StochasticRoundingAdamW"]),
    "8-bit AdamW": ("lean_optimizers", ["AdamW8bit"]),
    "micro-batches": ("gradient_accumulation", ["accumulate_gradients", "split_batch"]),
    "optimizer in backward": ("gradient_accumulation", ["optimizer_in_backward"]),
    "activation offloading": ("offloading", ["offload_activations"]),
    "optimizer state offloading": ("offloading", ["offload_optimizer_state"]),
    "parameter offloading": ("offloading", ["stream_parameters"]),
}

#: Of weights on the host, too, the state is beside a GPU and not a CPU.
_ZEROS_ON_HOST = (
    "def zeros_on_host(*size, dtype=None, device=None):",
    '    return far_zeros(*size, dtype=dtype, device="cuda")',
)

#: Parameters from which on a model is large.
_LARGE = 10**9


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
    if "parameter offloading" in on:
        on.discard("optimizer in backward")  # the gradients wait on the host, too
    lines = _imports(model, on, lora)
    lines += ["", "", *_optimizer(on, model)]
    lines += ["", "", "def train():", *_indented(_model(model, on, micro_batch, lora))]
    lines += ["", *_indented(_attached(on))]
    loop = loop_of(model, on, batch, sequence, micro_batch, _sixteen_bits(model, on))
    lines += ["", *_indented(loop)]
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
        if "optimizer state offloading" in on:
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
        if "optimizer state offloading" in on:
            options.append("zeros=zeros_on_host")
            lines = [*_ZEROS_ON_HOST, "", "", *lines]
        return [*lines, f"    return AdamW8bit(parameters, {', '.join(options)})"]
    if "BF16 weights" in on:
        options = ["lr=1e-5", *slices]
        made = f"StochasticRoundingAdamW(parameters, {', '.join(options)})"
    else:
        fused = ", fused=True" if "fused AdamW" in on else ""
        made = f"torch.optim.AdamW(parameters, lr=1e-5{fused})"
    if "optimizer state offloading" not in on:
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
    # Parameters that are offloaded were never all on the GPU.
    to_gpu = "" if "parameter offloading" in on else '.to("cuda")'
    lines = [
        f"config = {model.config_source}",
        f"# With your weights: {model.auto_class}.from_pretrained(..., dtype=torch.{dtype})",
        f"model = {made}{to_gpu}.train()",
    ]
    if not model.images:
        lines.append("model.config.use_cache = False")
    if lora is not None:
        lines.append(f'adapters = LoraConfig(r={lora}, target_modules="all-linear")')
        lines.append("model = get_peft_model(model, adapters)")
    if "BF16 autocast" in on and "BF16 weights" not in on:
        cache = ", cache_weights=False" if "checkpoints" in on else ""
        lines.append(f"apply_mixed_precision(model, torch.bfloat16{cache})")
    if "parameter offloading" in on:
        lines += _offloaded_parameters()
    layer_major = {"micro-batches", "optimizer in backward"} <= on
    if "checkpoints" in on and not layer_major:
        lines.append("apply_gradient_checkpointing(model)")
    if layer_major:
        lines.append("# Each block is computed again in backward, one micro-batch at a time.")
        lines.append(f"apply_layer_major_micro_batches(model, {micro_batch})")
    if "fused loss" in on:
        lines.append("apply_fused_loss(model)")
    return lines


def _offloaded_parameters() -> list[str]:
    return [
        "# The longest list of layers is that of the blocks: they wait on the host, pinned.",
        "lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]",
        'stream_parameters(max(lists, key=len), device="cuda")',
        "for tensor in [*model.parameters(), *model.buffers()]:",
        "    if not tensor.is_pinned():",
        '        tensor.data = tensor.data.to("cuda")',
    ]


def _attached(on: set[str]) -> list[str]:
    lines = []
    if "optimizer in backward" in on:
        lines.append("optimizer = optimizer_in_backward(model, make_optimizer)")
    else:
        lines.append("trained = [p for p in model.parameters() if p.requires_grad]")
        lines.append("optimizer = make_optimizer(trained)")
    if "activation offloading" in on:
        lines.append("far = offload_activations(model)")
    return lines


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" if line else "" for line in lines]
