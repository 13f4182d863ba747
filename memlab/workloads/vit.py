"""The Vision Transformer, written to be read from top to bottom.

The architecture of Dosovitskiy et al., "An Image Is Worth 16x16 Words" (2021,
https://arxiv.org/abs/2010.11929): the image is cut into patches, each patch becomes one vector, and
a transformer like GPT's, but one in which every position sees every other, reads the class from an
extra first vector. It repeats some lines of gpt.py, so that each file can be read, and taken,
alone.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTIONS = ("sdpa", "naive")


@dataclass(frozen=True)
class ViTConfig:
    """The sizes and options of a ViT.

    Images are `channels` x `image_size` x `image_size`, patches `patch_size` x `patch_size`.
    `attention` is "sdpa" (`torch.nn.functional.scaled_dot_product_attention`, which need not hold
    the scores) or "naive" (which holds them all). `dropout` is a probability; it applies to the
    embeddings, the attention weights and the output of each sublayer.

    Raises ValueError for a size below 1, an image that the patches do not fill, a `hidden` that the
    heads cannot share evenly, a dropout outside [0, 1) or an unknown attention, and TypeError for a
    size that is not an int.
    """

    image_size: int
    patch_size: int
    channels: int
    classes: int
    layers: int
    heads: int
    hidden: int
    dropout: float = 0.0
    attention: str = "sdpa"

    def __post_init__(self):
        for name in (
            "image_size",
            "patch_size",
            "channels",
            "classes",
            "layers",
            "heads",
            "hidden",
        ):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} must be an int, but it is {size!r}.")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, but it is {size}.")
        if self.image_size % self.patch_size:
            raise ValueError(
                "image_size must be divisible by patch_size, but "
                f"{self.image_size} / {self.patch_size} leaves {self.image_size % self.patch_size}."
            )
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
    def sequence_length(self) -> int:
        """The positions that the blocks see: the patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def parameter_count(self) -> int:
        """The model's parameters."""
        # Query, key, value: 3 hidden^2; projection: 1; MLP: 4 + 4. Biases: 3 + 1 + 4 + 1; two
        # norms: 2 + 2.
        block = 12 * self.hidden**2 + 13 * self.hidden
        patch_embedding = (self.channels * self.patch_size**2 + 1) * self.hidden
        head = (self.hidden + 1) * self.classes
        # The class token, the positions and the last norm's weight and bias are hidden wide.
        return (
            self.layers * block
            + patch_embedding
            + (1 + self.sequence_length + 2) * self.hidden
            + head
        )


class SelfAttention(nn.Module):
    """Multi-head attention in which every position sees every other.

    Takes and returns (batch, sequence, hidden).
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads = config.heads
        self.attention = config.attention
        self.dropout = config.dropout
        # One matrix product for query, key and value of all heads.
        self.query_key_value = nn.Linear(config.hidden, 3 * config.hidden)
        self.projection = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, hidden = x.shape
        query, key, value = (
            part.view(batch, sequence, self.heads, hidden // self.heads).transpose(1, 2)
            for part in self.query_key_value(x).split(hidden, dim=2)
        )  # each (batch, heads, sequence, hidden / heads)
        if self.attention == "sdpa":
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        else:
            # Each of the first three lines makes a tensor of (batch, heads, sequence, sequence).
            scores = query @ key.transpose(-2, -1) / math.sqrt(hidden // self.heads)
            weights = F.softmax(scores, dim=-1)
            weights = F.dropout(weights, self.dropout, self.training)
            y = weights @ value
        return self.projection(y.transpose(1, 2).reshape(batch, sequence, hidden))


class MLP(nn.Module):
    """Two linear layers with a GELU between them: (batch, sequence, hidden) to the same."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.expansion = nn.Linear(config.hidden, 4 * config.hidden)
        self.activation = nn.GELU()
        self.projection = nn.Linear(4 * config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.activation(self.expansion(x)))


class Block(nn.Module):
    """One layer of the ViT: takes and returns (batch, sequence, hidden)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class ViT(nn.Module):
    """A Vision Transformer of the given sizes; its layers are `blocks`, an `nn.ModuleList`."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        # A convolution that never overlaps itself: one linear layer, applied to each patch.
        self.patch_embedding = nn.Conv2d(
            config.channels, config.hidden, config.patch_size, stride=config.patch_size
        )
        self.class_token = nn.Parameter(torch.empty(1, 1, config.hidden))
        self.position_embedding = nn.Parameter(
            torch.empty(1, config.sequence_length, config.hidden)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.head = nn.Linear(config.hidden, config.classes)
        self.initialize()

    def initialize(self) -> None:
        """Draw new weights: Xavier for linear layers, 1 / sqrt(inputs) for the patches, 0.02 for
        the rest.

        The paper starts the head at zero. Here it is drawn like the others, since a head of zeros
        sends no gradient to the blocks in the first step, and a comparison of two such gradients
        would prove nothing.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        inputs = self.patch_embedding.weight[0].numel()
        nn.init.normal_(self.patch_embedding.weight, std=1 / math.sqrt(inputs))
        nn.init.zeros_(self.patch_embedding.bias)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.02)

    def features(self, images: Tensor) -> Tensor:
        """Everything but the head: images to the class token's output, (batch, hidden)."""
        self._check(images)
        patches = (
            self.patch_embedding(images).flatten(2).transpose(1, 2)
        )  # (batch, patches, hidden)
        class_token = self.class_token.expand(images.shape[0], -1, -1)
        x = self.dropout(torch.cat((class_token, patches), dim=1) + self.position_embedding)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)[:, 0]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) of images (batch, channel, height, width), or the loss when given
        labels.

        The loss is the mean cross-entropy, a scalar, and it is returned alone, as gpt.py does.
        Labels are int64 (batch,).

        Raises TypeError for images that are not floating point or labels that are not int64, and
        ValueError for a wrong shape or an empty batch.
        """
        if labels is not None:
            if labels.dtype != torch.int64:
                raise TypeError(
                    f"labels must be int64, but they are {labels.dtype}: use labels.long()."
                )
            if labels.shape != images.shape[:1]:
                raise ValueError(
                    f"labels must be ({images.shape[0]},), one for each image, "
                    f"but the shape is {tuple(labels.shape)}."
                )
        logits = self.head(self.features(images))
        if labels is None:
            return logits
        return F.cross_entropy(logits, labels)

    def _check(self, images: Tensor) -> None:
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point, but they are {images.dtype}: use images.float() /"
                " 255."
            )
        if images.ndim != 4 or images.shape[0] == 0 or images.shape[1:] != expected:
            raise ValueError(
                "images must be (batch, channel, height, width) with at least one image of "
                f"{expected}, but the shape is {tuple(images.shape)}."
            )


# The geometries. Each takes changes by name: vit_b_16(classes=10, channels=1).


def vit_b_16(**changes) -> ViTConfig:
    """ViT-B/16 for 1000 classes at 224 x 224, 86,567,656 parameters."""
    return replace(
        ViTConfig(224, 16, channels=3, classes=1000, layers=12, heads=12, hidden=768), **changes
    )


def vit_l_16(**changes) -> ViTConfig:
    """ViT-L/16 for 1000 classes at 224 x 224, 304,326,632 parameters."""
    return replace(
        ViTConfig(224, 16, channels=3, classes=1000, layers=24, heads=16, hidden=1024), **changes
    )


def small(**changes) -> ViTConfig:
    """A ViT for 32 x 32 digits in one channel, for a CPU: 65 positions an image."""
    return replace(
        ViTConfig(32, 4, channels=1, classes=10, layers=6, heads=4, hidden=128), **changes
    )
