"""The models of the zoo: small ones of many kinds, and a batch for each.

Hugging Face's are built from configurations. Nothing is downloaded. A width of 32 and two layers
are enough: what is compared is bytes, and each operator is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlab.workloads import gpt, vit

BATCH = 4
LENGTH = 16
WORDS = 96


class Animal(NamedTuple):
    """A model, and what it learns from.

    Attributes:
        name: the model's.
        make: builds it.
        batch: makes a batch: the model's arguments by name.
        library: where the model comes from.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    library: str = "transformers"


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A model's loss on a batch."""
    output = model(**batch)
    return output if isinstance(output, Tensor) else output.loss


# Batches ------------------------------------------------------------------------------------------


def tokens(name: str = "labels") -> dict[str, Tensor]:
    """Words, `(batch, length)`, that are also the targets."""
    words = torch.randint(3, WORDS, (BATCH, LENGTH))
    return {"input_ids": words, name: words.clone()}


def padded_tokens() -> dict[str, Tensor]:
    """The same, and a mask: each row has words less than the one before."""
    batch = tokens()
    lengths = torch.arange(LENGTH, LENGTH - BATCH, -1)
    mask = (torch.arange(LENGTH)[None, :] < lengths[:, None]).long()
    return {**batch, "attention_mask": mask}


def pairs_of_texts() -> dict[str, Tensor]:
    """A text to read, and a shorter one to write."""
    words = torch.randint(3, WORDS, (BATCH, LENGTH))
    return {"input_ids": words, "labels": torch.randint(3, WORDS, (BATCH, LENGTH // 2))}


def classified_text() -> dict[str, Tensor]:
    words = torch.randint(3, WORDS, (BATCH, LENGTH))
    return {"input_ids": words, "labels": torch.randint(2, (BATCH,))}


def images(size: int = 32, name: str = "pixel_values") -> dict[str, Tensor]:
    """Images, `(batch, 3, size, size)`, and a class for each."""
    return {name: torch.randn(BATCH, 3, size, size), "labels": torch.randint(2, (BATCH,))}


def masked_images(size: int = 64) -> dict[str, Tensor]:
    """Images, and a class for each of their pixels."""
    return {
        "pixel_values": torch.randn(BATCH, 3, size, size),
        "labels": torch.randint(2, (BATCH, size, size)),
    }


def images_with_texts() -> dict[str, Tensor]:
    words = torch.randint(3, WORDS, (BATCH, LENGTH))
    pictures = torch.randn(BATCH, 3, 32, 32)
    return {"input_ids": words, "pixel_values": pictures, "return_loss": True}


def sounds() -> dict[str, Tensor]:
    """Sounds, `(batch, samples)`, and a class for each."""
    return {"input_values": torch.randn(BATCH, 800), "labels": torch.randint(2, (BATCH,))}


def spectrograms() -> dict[str, Tensor]:
    """Spectrograms, `(batch, bands, frames)`, and the words spoken."""
    words = torch.randint(3, WORDS, (BATCH, LENGTH // 2))
    return {"input_features": torch.randn(BATCH, 16, 64), "labels": words}


# Hugging Face's -----------------------------------------------------------------------------------

#: The sizes, by the name that most configurations use.
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def hugging_face(kind: str, head: str, **sizes: object) -> Callable[[], nn.Module]:
    """A function that builds a model of Hugging Face.

    Args:
        kind: the configuration's class without `Config`.
        head: the class that builds it, such as `AutoModelForCausalLM`.
        **sizes: for the configuration.
    """

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**sizes)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        of_head = getattr(transformers, head)
        model = of_head.from_config(config) if head.startswith("Auto") else of_head(config)
        return model.train()

    return make


def writer(name: str, kind: str, batch: Callable = tokens, **sizes: object) -> Animal:
    """A model that writes on: a decoder."""
    return Animal(name, hugging_face(kind, "AutoModelForCausalLM", **sizes), batch)


def reader(name: str, kind: str, batch: Callable = tokens, **sizes: object) -> Animal:
    """A model that reads, with a head for words left out."""
    return Animal(name, hugging_face(kind, "AutoModelForMaskedLM", **SIZES | sizes), batch)


def viewer(name: str, kind: str, size: int = 32, **sizes: object) -> Animal:
    """A model that says what an image shows."""
    make = hugging_face(kind, "AutoModelForImageClassification", num_labels=2, **sizes)
    return Animal(name, make, lambda: images(size))


def decoders() -> list[Animal]:
    few = {"num_key_value_heads": 2}
    experts = {"num_experts_per_tok": 2, **few}
    of_gpt2 = {"vocab_size": WORDS, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
    no_words = {"bos_token_id": 1, "eos_token_id": 2}
    return [
        writer("GPT-2", "GPT2", **of_gpt2, **no_words),
        writer("GPT-2, padded", "GPT2", padded_tokens, **of_gpt2, **no_words),
        writer("Llama", "Llama", **SIZES, **few),
        writer("Llama, padded", "Llama", padded_tokens, **SIZES, **few),
        writer("Llama, eager attention", "Llama", **SIZES, **few, attn_implementation="eager"),
        writer("Qwen3", "Qwen3", **SIZES, **few, head_dim=8),
        writer("Qwen3-MoE", "Qwen3Moe", **SIZES, **experts, num_experts=4, head_dim=8,
               moe_intermediate_size=16),
        writer("Gemma 3", "Gemma3Text", **SIZES, **few, head_dim=8, sliding_window=8),
        writer("Mistral", "Mistral", **SIZES, **few, sliding_window=8),
        writer("Mixtral", "Mixtral", **SIZES, **experts, num_local_experts=4),
        writer("Phi", "Phi", **SIZES),
        writer("Phi-3", "Phi3", **SIZES, **few),
        writer("OLMo 2", "Olmo2", **SIZES, **few),
        writer("OPT", "OPT", **SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        writer("GPT-NeoX", "GPTNeoX", **SIZES),
        writer("Falcon", "Falcon", **SIZES),
        writer("BLOOM", "Bloom", vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4),
        writer("Mamba", "Mamba", vocab_size=WORDS, hidden_size=32, num_hidden_layers=2,
               state_size=8),
        writer("DeepSeek V3", "DeepseekV3", **SIZES, num_experts_per_tok=2, n_routed_experts=4,
               moe_intermediate_size=16, n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16,
               qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1),
        writer("gpt-oss", "GptOss", **SIZES, **experts, num_local_experts=4, head_dim=8),
    ]  # fmt: skip


def encoders() -> list[Animal]:
    make_classifier = hugging_face("Bert", "AutoModelForSequenceClassification", **SIZES)
    return [
        reader("BERT", "Bert"),
        reader("BERT, padded", "Bert", padded_tokens),
        Animal("BERT, classes", make_classifier, classified_text),
        reader("RoBERTa", "Roberta"),
        reader("DistilBERT", "DistilBert", dim=32, hidden_dim=64, n_layers=2, n_heads=4),
        reader("DeBERTa v2", "DebertaV2", pos_att_type=["c2p", "p2c"], relative_attention=True),
        reader("ALBERT", "Albert", embedding_size=16),
        reader("ELECTRA", "Electra", embedding_size=16),
        reader("ModernBERT", "ModernBert", global_attn_every_n_layers=2, local_attention=8),
    ]


def encoder_decoders() -> list[Animal]:
    t5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    make_t5 = hugging_face("T5", "AutoModelForSeq2SeqLM", **t5, num_heads=4,
                           decoder_start_token_id=0)  # fmt: skip
    halves = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": WORDS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    make_bart = hugging_face("Bart", "AutoModelForSeq2SeqLM", **halves, max_position_embeddings=64)
    make_whisper = hugging_face(
        "Whisper",
        "WhisperForConditionalGeneration",
        **halves,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
    )
    return [
        Animal("T5", make_t5, pairs_of_texts),
        Animal("BART", make_bart, pairs_of_texts),
        Animal("Whisper", make_whisper, spectrograms),
    ]


def of_images_and_sounds() -> list[Animal]:
    plain = {name: SIZES[name] for name in ("hidden_size", "intermediate_size")}
    plain |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    text = {name: size for name, size in SIZES.items() if not name.endswith("token_id")}
    both = {
        "text_config": {**text, "eos_token_id": 2},
        "vision_config": {**plain, "image_size": 32, "patch_size": 8},
        "projection_dim": 16,
    }
    stages = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]}
    make_segformer = hugging_face(
        "Segformer",
        "AutoModelForSemanticSegmentation",
        num_labels=2,
        **stages,
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
    )
    make_wav2vec = hugging_face(
        "Wav2Vec2",
        "AutoModelForAudioClassification",
        **plain,
        conv_dim=[16, 16],
        conv_stride=[5, 4],
        conv_kernel=[10, 8],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        num_labels=2,
        apply_spec_augment=False,
    )
    return [
        viewer("ViT", "ViT", **plain, image_size=32, patch_size=8),
        viewer("DINOv2", "Dinov2", **plain, image_size=32, patch_size=8),
        viewer("BEiT", "Beit", **plain, image_size=32, patch_size=8,
               use_relative_position_bias=True, layer_scale_init_value=0.1),
        viewer("Swin", "Swin", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2],
               num_heads=[2, 4], window_size=4),
        viewer("ConvNeXt", "ConvNext", **stages),
        viewer("ResNet", "ResNet", **stages, embedding_size=8, layer_type="bottleneck"),
        viewer("MobileNet V2", "MobileNetV2", image_size=32, depth_multiplier=0.25),
        viewer("RegNet", "RegNet", **stages, embedding_size=8, groups_width=4),
        Animal("SegFormer", make_segformer, masked_images),
        Animal("CLIP", hugging_face("CLIP", "CLIPModel", **both), images_with_texts),
        Animal("Wav2Vec 2.0", make_wav2vec, sounds),
    ]  # fmt: skip


# Ours, and PyTorch's ------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Words through an LSTM or a GRU."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.layers = kind(32, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, WORDS)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        states, _ = self.layers(self.embedding(tokens))
        logits = self.head(states)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class ConvNet(nn.Module):
    """Convolutions with batch norm, and a pooling."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.GELU(),
            nn.Dropout2d(0.1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 2),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.layers(images), labels)


class Residual(nn.Module):
    """Two convolutions with group norms, and a sum."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(4, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class UNet(nn.Module):
    """Down, up, and across: it learns to give the image back."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.down = Residual(16)
        self.narrow = nn.Conv2d(16, 32, 2, stride=2)
        self.middle = Residual(32)
        self.widen = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.up = Residual(32)
        self.leave = nn.Conv2d(32, 3, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        wide = self.down(self.enter(images))
        again = self.widen(self.middle(self.narrow(wide)))
        result = self.leave(self.up(torch.cat([wide, again], dim=1)))
        return nn.functional.mse_loss(result, images)


class Transformer(nn.Module):
    """PyTorch's own encoder, with dropout."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, WORDS)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.layers(self.embedding(tokens)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def our_tokens() -> dict[str, Tensor]:
    words = torch.randint(WORDS, (BATCH, LENGTH))
    return {"tokens": words, "targets": words.clone()}


def our_digits() -> dict[str, Tensor]:
    return {"images": torch.randn(BATCH, 1, 32, 32), "labels": torch.randint(2, (BATCH,))}


def our_images() -> dict[str, Tensor]:
    return images(16, "images")


def of_pytorch() -> list[Animal]:
    small = {"vocabulary_size": WORDS, "layers": 2, "hidden": 32}
    few = {"layers": 2, "hidden": 32, "heads": 4}
    return [
        Animal("our GPT", lambda: gpt.GPT(gpt.tiny(**small)), our_tokens, "memlab"),
        Animal(
            "our GPT, naive, dropout",
            lambda: gpt.GPT(gpt.tiny(**small, attention="naive", dropout=0.1)),
            our_tokens,
            "memlab",
        ),
        Animal("our ViT", lambda: vit.ViT(vit.small(**few)), our_digits, "memlab"),
        Animal("LSTM", lambda: Recurrent(nn.LSTM), our_tokens, "torch"),
        Animal("GRU", lambda: Recurrent(nn.GRU), our_tokens, "torch"),
        Animal("convolutions, batch norm", ConvNet, our_images, "torch"),
        Animal("U-Net", UNet, our_images, "torch"),
        Animal("nn.TransformerEncoder", Transformer, our_tokens, "torch"),
    ]


def animals() -> list[Animal]:
    """All of them."""
    return [
        *decoders(),
        *encoders(),
        *encoder_decoders(),
        *of_images_and_sounds(),
        *of_pytorch(),
    ]
