"""What the tests of several modules need: small models and their runs, and how far numbers are
apart.
"""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers

from memlab import watch
from memlab.workloads import gpt


def equal(tensors, others):
    """Whether two lists of tensors are the same, bit for bit."""
    tensors = list(tensors)
    others = list(others)
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))


def largest_difference(tensors, others):
    """The largest difference between two lists of tensors, relative to the largest number in each
    of `others`. Two tensors may be given as they are.
    """
    if isinstance(tensors, torch.Tensor):
        tensors = [tensors]
        others = [others]
    pairs = [(ours.double(), theirs.double()) for ours, theirs in zip(tensors, others, strict=True)]
    assert pairs and all(ours.shape == theirs.shape for ours, theirs in pairs)
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def numbers_of(model):
    """All of them, with the buffers that are never saved."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def is_far(tensor):
    """Whether a tensor lies where the optimizer's far state does: in pinned memory or in a file."""
    return tensor.is_pinned() or tensor.untyped_storage().filename is not None


def saved_bytes(run, exclude=()):
    """Bytes that autograd saves for backward in `run`, by storage, without those of `exclude` and,
    where `run` returns a tensor, of its result.
    """
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    for tensor in exclude:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(size for size, _ in storages.values())


def global_hooks():
    """How many of each of PyTorch's global hooks are set: what a meter has to take off again."""
    return {
        name: len(registry)
        for place in (modules, optimizers)
        for name, registry in vars(place).items()
        if name.startswith("_global") and isinstance(registry, dict) and registry
    }


def small_gpt(**changes):
    """A seeded GPT of two layers and 500 words."""
    torch.manual_seed(0)
    return gpt.GPT(gpt.tiny(**{"layers": 2, "vocabulary_size": 500} | changes))


def run_gpt(model):
    """Its loss on a seeded batch, of which five targets are ignored."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(model.config.vocabulary_size, (2, 2, 24), generator=generator)
    targets[0, :5] = -100
    return model(tokens, targets)


def small_gpt2(**changes):
    """A seeded GPT-2 of Hugging Face with two layers, 400 words and no dropout."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 32}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    no_words = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**sizes | quiet | no_words | changes)
    return transformers.GPT2LMHeadModel(config).train()


def small_llama(**changes):
    """A seeded Llama of Hugging Face with two layers, 400 words and a tied embedding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**sizes | heads | changes)
    return transformers.LlamaForCausalLM(config).train()


def run_hugging_face(model):
    """A Hugging Face model's loss on a seeded batch, of which the first four targets of each row
    are ignored, as those of a prompt.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, 20), generator=generator)
    labels = tokens.clone()
    labels[:, :4] = -100
    return model(input_ids=tokens, labels=labels, use_cache=False).loss


def training_step(optimizer, loss_of):
    """The step of a plain run: forward, backward, optimizer; `loss_of()` is the forward."""

    def step():
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


class ResidualBlock(nn.Module):
    """What U-Nets are made of: two convolutions and a sum, without batch norm."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.last(nn.functional.silu(self.first(self.norm(x))))


class UNet(nn.Module):
    """A small one: three stages of blocks, of which the middle has a single block."""

    def __init__(self, channels=4):
        super().__init__()
        self.enter = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Sequential(*(ResidualBlock(channels) for _ in range(2)))
        self.narrow = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.middle = nn.ModuleList([ResidualBlock(2 * channels)])
        self.widen = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.up = nn.ModuleList(ResidualBlock(channels) for _ in range(3))
        self.leave = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x):
        skipped = self.down(self.enter(x))
        x = self.narrow(skipped)
        for block in self.middle:
            x = block(x)
        x = self.widen(x) + skipped
        for block in self.up:
            x = block(x)
        return self.leave(x)


def a_t5(**changes):
    """A seeded encoder-decoder of Hugging Face with three layers each, and its loss on a batch of
    four.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    config = transformers.T5Config(
        **sizes | {"dropout_rate": 0.0, "decoder_start_token_id": 0} | changes
    )
    model = transformers.T5ForConditionalGeneration(config)
    tokens = torch.randint(1, 50, (4, 6))
    labels = torch.randint(1, 50, (4, 5))
    return model, lambda: model(input_ids=tokens, labels=labels, use_cache=False).loss


def a_whisper():
    """A seeded Whisper with two layers that hear and three that write, and its loss on a batch of
    four.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=60,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.0,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    sound = torch.randn(4, 8, 20)
    labels = torch.randint(3, 60, (4, 6))
    return model, lambda: model(input_features=sound, labels=labels, use_cache=False).loss


def a_resnet():
    """A seeded ResNet of Hugging Face with four stages, and its loss on a batch of four."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[2] * 4, layer_type="basic"
    )
    model = transformers.ResNetForImageClassification(config)
    images = torch.randn(4, 3, 32, 32)
    return model, lambda: model(pixel_values=images, labels=torch.tensor([0, 1, 1, 0])).loss


def a_unet():
    """A seeded U-Net, and its loss on a batch of four."""
    torch.manual_seed(0)
    model = UNet()
    images = torch.randn(4, 3, 8, 8)
    return model, lambda: model(images).float().square().mean()


def columns_alive() -> dict[str, int]:
    """What a watch finds by column before anything runs: other tests have left some models behind,
    and everything in the process counts.
    """
    with watch() as nothing:
        pass
    return nothing.measurement.columns
