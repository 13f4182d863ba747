"""A fine-tuning loop for Hugging Face's language models, with the switches that people turn first.

The loop is what a person would write for a GPU. `memlab.predict` runs it without one, and
notebooks/in_depth/e8_will_it_fit.ipynb is about what it needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from memlab.techniques._blocks import _find_blocks
from memlab.techniques.chunked_input import apply_chunked_feed_forward
from memlab.techniques.compilation_and_fusion import apply_fused_loss
from memlab.techniques.gradient_accumulation import OptimizerInBackward, optimizer_in_backward
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing
from memlab.techniques.lean_optimizers import AdamW8bit
from memlab.techniques.low_precision import StochasticRoundingAdamW, stochastic_round
from memlab.techniques.offloading import offload_activations
from memlab.workloads.geometries import hugging_face_config
from memlab.workloads.quiet import quiet_libraries

#: Numbers that a step of our own optimizers takes at a time. Its temporaries are 192 to 320 MiB:
#: small beside a model of billions, and a GPU has few kernels to launch.
SLICE = 2**24


def fine_tune(
    model: str = "GPT-2 124M",
    *,
    batch: int = 1,
    sequence: int = 1024,
    micro_batches: int = 1,
    lora: bool = False,
    checkpoints: bool = False,
    fused_loss: bool = False,
    adamw_8bit: bool = False,
    fused_adamw: bool = True,
    layers: int | None = None,
    attention: str = "sdpa",
    mixed_precision: bool = True,
    offload: bool = False,
    bf16_weights: bool = False,
    shard: bool = False,
    sequences_on_gpu: int = 0,
    channels: float = 1.0,
    mlp_chunk: int | None = None,
    in_backward: bool = False,
) -> Iterator[Tensor]:
    """Fine-tune a language model on a GPU; a run for `memlab.predict`.

    Full fine-tuning has FP32 weights under BF16 autocast. The base of a LoRA is frozen, in BF16.

    Args:
        model: a built-in model's name, or the path of a `config.json`.
        batch, sequence: how many sequences a step has, and how many tokens a sequence has.
        micro_batches: go through the batch in so many equal parts, and add up their gradients.
        lora: train adapters of rank 16 on all linear layers (PEFT), and nothing else.
        checkpoints, fused_loss: compute blocks again in backward; logits a few tokens at a time.
        adamw_8bit, fused_adamw: AdamW's moments in 8 bits; its step in one kernel, not foreach.
        layers, attention: so many blocks instead of all; "eager" holds each pair of tokens' score.
        mixed_precision: compute in BF16. A LoRA's base is then held in BF16 as well.
        offload: keep on the host what forward saves for backward; with `checkpoints`, their inputs.
        bf16_weights: BF16 weights, gradients and state, rounded stochastically; not for a LoRA.
        shard: divide the model's state over the ranks: `predict(fine_tune, ranks=8, shard=True)`.
        sequences_on_gpu: keep so many sequences of training data on the GPU, as int64.
        channels, mlp_chunk: the share of the MLPs' channels there is; tokens at a time of an MLP.
        in_backward: step each weight as soon as its gradient is there; not with micro-batches.

    Yields:
        The loss, a scalar.

    Raises:
        ImportError: transformers or, for a LoRA, PEFT is not installed.
        ValueError: an unknown model, or sizes or switches that do not go together. It says which.
    """
    sizes = {"batch": batch, "sequence": sequence, "sequences_on_gpu": sequences_on_gpu}
    config = _configuration(
        model, layers, channels, in_backward, **sizes, micro_batches=micro_batches
    )
    network = build_language_model(config, lora, attention, mixed_precision, bf16_weights, shard)
    saved = _apply(network, checkpoints, fused_loss, offload, shard, mixed_precision, mlp_chunk)
    optimizer = _optimizer(network, adamw_8bit, bf16_weights, fused_adamw, in_backward)
    autocast = mixed_precision and not bf16_weights and not shard
    batches = _batches(config.vocab_size, **sizes)
    yield from _train(network, optimizer, batches, micro_batches, saved, autocast)


def _train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Tensor],
    micro_batches: int,
    saved: contextlib.AbstractContextManager,
    autocast: bool,
) -> Iterator[Tensor]:
    for tokens in batches:
        loss = _compute_gradients(network, tokens, micro_batches, saved, autocast)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def _configuration(
    model: str, layers: int | None, channels: float, in_backward: bool, **sizes: int
) -> object:
    if in_backward and sizes["micro_batches"] > 1:
        raise ValueError(
            "a gradient is complete only after the last micro-batch, so no weight can be stepped in"
            " backward: leave in_backward out, or micro_batches"
        )
    config = hugging_face_config(model)
    config.num_hidden_layers = config.num_hidden_layers if layers is None else layers
    _cut_channels(config, channels)
    _check_sizes(config, model, **sizes)
    return config


def _cut_channels(config: object, share: float) -> None:
    """Let the MLPs have this share of their channels: a pruned checkpoint has such a config."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"channels has to be a share above 0 and at most 1, not {share!r}")
    name = "n_inner" if hasattr(config, "n_inner") else "intermediate_size"
    whole = getattr(config, name) or 4 * config.hidden_size  # GPT-2 leaves it out
    setattr(config, name, max(1, round(share * whole)))


def _apply(
    network: nn.Module,
    checkpoints: bool,
    fused_loss: bool,
    offload: bool,
    shard: bool,
    mixed_precision: bool,
    mlp_chunk: int | None,
) -> contextlib.AbstractContextManager:
    """Change the network, and return the context that its forward runs in."""
    if mlp_chunk is not None:
        apply_chunked_feed_forward(network, "mlp", mlp_chunk, recompute=True)
    if checkpoints:
        apply_gradient_checkpointing(network)
    if fused_loss:
        apply_fused_loss(network)
    if shard:
        _shard(network, mixed_precision)
    return offload_activations(network) if offload else contextlib.nullcontext()


def _compute_gradients(
    network: nn.Module,
    tokens: Tensor,
    micro_batches: int,
    saved: contextlib.AbstractContextManager,
    autocast: bool,
) -> Tensor:
    """Go forward and backward, and return the loss of the last micro-batch."""
    for rows in tokens.chunk(micro_batches):
        with saved, torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = network(input_ids=rows, labels=rows).loss
        # The micro-batches have the same number of tokens: their means weigh the same.
        (loss if micro_batches == 1 else loss / micro_batches).backward()
    return loss


def _batches(vocabulary: int, batch: int, sequence: int, sequences_on_gpu: int) -> Iterator[Tensor]:
    """Tokens `(batch, sequence)`, without end. They come alone, or out of data that stays."""
    data = torch.zeros(sequences_on_gpu, sequence, dtype=torch.int64, device="cuda")
    while True:
        if sequences_on_gpu:
            yield data[torch.randint(sequences_on_gpu, (batch,), device="cuda")]
        else:
            yield torch.randint(vocabulary, (batch, sequence), device="cuda")


def _optimizer(
    network: nn.Module,
    adamw_8bit: bool,
    bf16_weights: bool,
    fused_adamw: bool,
    in_backward: bool,
) -> torch.optim.Optimizer | OptimizerInBackward:
    def make_optimizer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        if adamw_8bit:
            rounding = stochastic_round if bf16_weights else None
            return AdamW8bit(weights, lr=1e-5, rounding=rounding, slice_size=SLICE)
        if bf16_weights:
            return StochasticRoundingAdamW(weights, lr=1e-5, slice_size=SLICE)
        return torch.optim.AdamW(weights, lr=1e-5, fused=fused_adamw, foreach=not fused_adamw)

    if in_backward:
        return optimizer_in_backward(network, make_optimizer)
    return make_optimizer([weight for weight in network.parameters() if weight.requires_grad])


def _check_sizes(config: object, model: str, **sizes: int) -> None:
    for name, size in {**sizes, "layers": config.num_hidden_layers}.items():
        least = 0 if name == "sequences_on_gpu" else 1
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"{name} has to be a whole number of at least {least}, not {size!r}")
    # Shapes alone do not show it: a position too far is a row that the embedding does not have.
    if sizes["sequence"] > config.max_position_embeddings:
        raise ValueError(
            f"{model} reads at most {config.max_position_embeddings:,} tokens, not"
            f" {sizes['sequence']:,}: give a shorter sequence"
        )
    if sizes["batch"] % sizes["micro_batches"]:
        raise ValueError(
            f"a batch of {sizes['batch']} cannot be cut into {sizes['micro_batches']} equal"
            " micro-batches: give a number that divides it"
        )


def _shard(network: nn.Module, mixed_precision: bool) -> None:
    """Shard a model on the meta device, each of its blocks by itself, and give it memory.

    A person then loads a checkpoint: each rank reads its own slices.
    """
    from torch.distributed import get_world_size, init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {"mesh": init_device_mesh("cuda", (get_world_size(),))}
    if mixed_precision:
        # Autocast would keep its 16-bit copy of each weight that was gathered.
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in _find_blocks(network).values():
        fully_shard(block, **options)
    fully_shard(network, **options)
    network.to_empty(device="cuda")


def build_language_model(
    config: object,
    lora: bool,
    attention: str = "sdpa",
    mixed_precision: bool = True,
    bf16_weights: bool = False,
    on_meta: bool = False,
) -> nn.Module:
    """Build a language model, in training mode.

    Args:
        config: its transformers configuration.
        lora: whether it gets adapters, on a frozen base.
        attention: "sdpa" or "eager", as transformers calls them.
        mixed_precision: whether that base is in BF16. What is trained is FP32.
        bf16_weights: train in BF16 instead. A LoRA's base is in BF16 without it.
        on_meta: whether it is built without bytes instead, as a model that is to be sharded: the
            whole may be too large for a GPU.

    Raises:
        ImportError: transformers or, for a LoRA, PEFT is not installed.
        ValueError: BF16 weights and a LoRA together.
    """
    if lora and bf16_weights:
        raise ValueError(
            "the frozen base of a LoRA is in BF16 already: leave bf16_weights out, or lora"
        )
    dtype = torch.bfloat16 if bf16_weights or (lora and mixed_precision) else torch.float32
    config.use_cache = False  # the cache is for generating text
    with quiet_libraries(), torch.device("meta" if on_meta else "cuda"):
        import transformers

        network = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
        network.loss_type = "ForCausalLM"  # GPT-2's class has another name than the newer models'
        if lora:
            network = _with_adapters(network, config)
    return network.train()


def _with_adapters(network: nn.Module, config: object) -> nn.Module:
    import peft

    # GPT-2's linear layers have their weights the other way round.
    turned = config.model_type == "gpt2"
    return peft.get_peft_model(
        network, peft.LoraConfig(r=16, target_modules="all-linear", fan_in_fan_out=turned)
    )
