"""GPT-2, written to be read from top to bottom.

The architecture of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019):
learned positions, layer norm before each sublayer, GELU in its tanh form, an MLP four times as wide
as the model, and an output layer that shares its weight with the token embedding. The form follows
Karpathy's nanoGPT (https://github.com/karpathy/nanoGPT).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTIONS = ("sdpa", "naive")


@dataclass(frozen=True)
class GPTConfig:
    """The sizes and options of a GPT.

    `attention` is "sdpa" (`torch.nn.functional.scaled_dot_product_attention`, which need not hold
    the scores) or "naive" (which holds them all). `dropout` is a probability; it applies to the
    embeddings, the attention weights and the output of each sublayer. `bias` gives the linear
    layers and the layer norms a bias, as GPT-2 has.

    Raises ValueError for a size below 1, a `hidden` that the heads cannot share evenly, a dropout
    below 0 or not below 1, or an unknown attention, and TypeError for a size that is not an int.
    """

    vocabulary_size: int
    context_length: int
    layers: int
    heads: int
    hidden: int
    dropout: float = 0.0
    attention: str = "sdpa"
    tied_embeddings: bool = True
    bias: bool = True

    def __post_init__(self):
        for name in ("vocabulary_size", "context_length", "layers", "heads", "hidden"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} must be an int, but it is {size!r}.")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, but it is {size}.")
        if self.hidden % self.heads:
            raise ValueError(
                "hidden must be divisible by heads, but "
                f"{self.hidden} / {self.heads} leaves {self.hidden % self.heads}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, but it is {self.dropout}.")
        if self.attention not in ATTENTIONS:
            raise ValueError(
                f"attention must be one of {', '.join(ATTENTIONS)}, but it is {self.attention!r}."
            )

    @property
    def parameter_count(self) -> int:
        """The model's parameters, shared ones once."""
        bias = int(self.bias)
        # Query, key, value: 3 hidden^2; projection: 1; MLP: 4 + 4. Biases: 3 + 1 + 4 + 1; two
        # norms: 2 + 2.
        block = 12 * self.hidden**2 + (9 * bias + 2 + 2 * bias) * self.hidden
        embeddings = self.vocabulary_size * (1 if self.tied_embeddings else 2) + self.context_length
        return self.layers * block + (embeddings + 1 + bias) * self.hidden


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what comes before it.

    Takes and returns (batch, sequence, hidden).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.attention = config.attention
        self.dropout = config.dropout
        # One matrix product for query, key and value of all heads.
        self.query_key_value = nn.Linear(config.hidden, 3 * config.hidden, bias=config.bias)
        self.projection = nn.Linear(config.hidden, config.hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, hidden = x.shape
        query, key, value = (
            part.view(batch, sequence, self.heads, hidden // self.heads).transpose(1, 2)
            for part in self.query_key_value(x).split(hidden, dim=2)
        )  # each (batch, heads, sequence, hidden / heads)
        if self.attention == "sdpa":
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        else:
            # Every line of this branch makes a tensor of (batch, heads, sequence, sequence).
            scores = query @ key.transpose(-2, -1) / math.sqrt(hidden // self.heads)
            future = torch.ones(sequence, sequence, dtype=torch.bool, device=x.device).triu(1)
            weights = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
            weights = F.dropout(weights, self.dropout, self.training)
            y = weights @ value
        return self.projection(y.transpose(1, 2).reshape(batch, sequence, hidden))


class MLP(nn.Module):
    """Two linear layers with a GELU between them: (batch, sequence, hidden) to the same."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.expansion = nn.Linear(config.hidden, 4 * config.hidden, bias=config.bias)
        self.activation = nn.GELU(approximate="tanh")
        self.projection = nn.Linear(4 * config.hidden, config.hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.activation(self.expansion(x)))


class Block(nn.Module):
    """One layer of the GPT: takes and returns (batch, sequence, hidden)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden, bias=config.bias)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class GPT(nn.Module):
    """A GPT-2 of the given sizes; its layers are `blocks`, an `nn.ModuleList`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.hidden)
        self.position_embedding = nn.Embedding(config.context_length, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.hidden, bias=config.bias)
        self.head = nn.Linear(config.hidden, config.vocabulary_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.token_embedding.weight
        self.initialize()

    def initialize(self) -> None:
        """Draw new weights as GPT-2 does: standard deviation 0.02, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # Each block adds to the residual stream twice: without this its variance would grow with
        # the depth.
        for block in self.blocks:
            for projection in (block.attention.projection, block.mlp.projection):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.layers))

    def features(self, tokens: Tensor) -> Tensor:
        """Everything but the output layer: tokens (batch, sequence) to (batch,
        sequence, hidden).
        """
        self._check(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (batch, sequence, vocabulary) of tokens (batch, sequence), or the loss when given
        targets.

        The loss is the mean cross-entropy, a scalar, and it is returned alone: a caller who held on
        to the logits would keep batch x sequence x vocabulary numbers alive through the backward
        pass, often the largest tensor of all. Targets have the shape of the tokens; as in
        `torch.nn.functional.cross_entropy`, -100 is left out.

        Raises TypeError for tokens that are not int64 or int32 or targets that are not int64, and
        ValueError for a wrong shape, an empty batch or more tokens than `context_length`.
        """
        if targets is not None:
            if targets.dtype != torch.int64:
                raise TypeError(
                    f"targets must be int64, but they are {targets.dtype}: use targets.long()."
                )
            if targets.shape != tokens.shape:
                raise ValueError(
                    "targets must have the shape of tokens, (batch, sequence), but tokens are "
                    f"{tuple(tokens.shape)} and targets {tuple(targets.shape)}."
                )
        logits = self.head(self.features(tokens))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _check(self, tokens: Tensor) -> None:
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"tokens must be int64 or int32, but they are {tokens.dtype}: use tokens.long()."
            )
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(
                "tokens must be (batch, sequence) with at least one token, but the shape is "
                f"{tuple(tokens.shape)}."
            )
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"tokens hold {tokens.shape[1]} positions, but the model knows"
                f" {self.config.context_length}: shorten the sequence or raise context_length."
            )


# The geometries. Each takes changes by name: gpt2_124m(attention="naive", dropout=0.1).


def gpt2_124m(**changes) -> GPTConfig:
    """GPT-2 small, 124,439,808 parameters."""
    return replace(GPTConfig(50257, 1024, layers=12, heads=12, hidden=768), **changes)


def gpt2_350m(**changes) -> GPTConfig:
    """GPT-2 medium, 354,823,168 parameters."""
    return replace(GPTConfig(50257, 1024, layers=24, heads=16, hidden=1024), **changes)


def gpt2_774m(**changes) -> GPTConfig:
    """GPT-2 large, 774,030,080 parameters."""
    return replace(GPTConfig(50257, 1024, layers=36, heads=20, hidden=1280), **changes)


def gpt2_1558m(**changes) -> GPTConfig:
    """GPT-2 XL, 1,557,611,200 parameters."""
    return replace(GPTConfig(50257, 1024, layers=48, heads=25, hidden=1600), **changes)


def small(**changes) -> GPTConfig:
    """A byte-level GPT of 1,255,424 parameters, for a CPU: tenths of a second for a step of 2,048
    tokens.
    """
    return replace(GPTConfig(256, 256, layers=6, heads=4, hidden=128), **changes)


def tiny(**changes) -> GPTConfig:
    """A byte-level GPT of 220,544 parameters, for a hundred steps in seconds on a CPU, and for
    tests.
    """
    return replace(GPTConfig(256, 64, layers=4, heads=2, hidden=64), **changes)


def activation_bytes(
    config: GPTConfig, batch_size: int, sequence_length: int, *, mixed_precision: bool = False
) -> int:
    """What forward leaves for backward in a training step without dropout: the ledger's activations
    at the peak.

    Counted by hand from what each operator saves, in bytes, for the CPU's kernels; CUDA's differ a
    little. In FP32 a token costs each layer 16 numbers of the hidden size: the inputs of two norms
    (2) and their outputs (2), query, key and value (3), the heads' output (1), the MLP's two
    tensors (8). Under 16-bit autocast only the inputs of the norms stay FP32, the other 14 halve,
    and autograd saves a 16-bit copy of every weight that a matrix product used.

    Raises ValueError for a config with dropout, whose masks are not counted, and for sizes that the
    model cannot take.
    """
    if config.dropout:
        raise ValueError(
            f"dropout's masks are not counted here: dropout must be 0, but it is {config.dropout}."
        )
    if batch_size < 1 or not 1 <= sequence_length <= config.context_length:
        raise ValueError(
            f"batch_size must be at least 1 and sequence_length from 1 to {config.context_length}, "
            f"but they are {batch_size} and {sequence_length}."
        )
    tokens, number = batch_size * sequence_length, 2 if mixed_precision else 4
    # The two norms also keep a mean and a deviation of each token.
    layer = (2 * 4 + 14 * number) * config.hidden + 2 * 2 * 4
    # The last norm, and the log-softmax.
    end = (4 + number) * config.hidden + 2 * 4 + 4 * config.vocabulary_size
    total = tokens * (config.layers * layer + end)
    if config.attention == "sdpa":
        total += config.layers * tokens * 4 * config.heads  # the softmax's denominators
    else:
        scores = batch_size * config.heads * sequence_length**2
        # The softmax's result, a mask of one byte a pair, and the number that the scores are
        # divided by.
        total += config.layers * (number * scores + sequence_length**2 + 8)
    if mixed_precision:
        total += 2 * (
            12 * config.layers * config.hidden**2 + config.vocabulary_size * config.hidden
        )
    return total + 8 * sequence_length + 8  # the positions' indices; the loss and its weight
