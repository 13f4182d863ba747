import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from memlab.workloads import vit
from memlab.workloads.vit import Block, SelfAttention, ViT, ViTConfig
from tests.helpers import count_parameters, equal

TINY = ViTConfig(16, 4, channels=2, classes=10, layers=2, heads=2, hidden=32)


def build(config, seed=0):
    torch.manual_seed(seed)
    return ViT(config)


def random_images(config=TINY, batch=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(
        batch, config.channels, config.image_size, config.image_size, generator=generator
    )


@pytest.mark.parametrize(
    "geometry, published", [(vit.vit_b_16, 86_567_656), (vit.vit_l_16, 304_326_632)]
)
def test_parameter_counts_are_the_published_ones(geometry, published):
    with torch.device("meta"):
        model = ViT(geometry())
    assert count_parameters(model) == published
    assert geometry().parameter_count == published


@pytest.mark.parametrize("config", [TINY, vit.small()])
def test_parameter_count_is_the_models(config):
    assert count_parameters(build(config)) == config.parameter_count


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_equals_hugging_face(attention, transformers):
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=16,
            patch_size=4,
            num_channels=2,
            num_labels=10,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_size=32,
            intermediate_size=128,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
    ).eval()
    torch.manual_seed(0)
    # Every parameter drawn anew: biases of zero and norms of one would hide a name mixed up.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    ours = build(dataclasses.replace(TINY, attention=attention)).eval()
    modules = dict(theirs.named_modules())

    def find(*endings):
        """Their module by the end of its name: what is before it differs between their versions."""
        found = [module for name, module in modules.items() if name.endswith(endings)]
        assert len(found) == 1, (endings, sorted(modules))
        return found[0]

    pairs = [
        (ours.patch_embedding, find("patch_embeddings.projection")),
        (ours.final_norm, find("vit.layernorm")),
        (ours.head, theirs.classifier),
    ]
    with torch.no_grad():
        ours.class_token.copy_(theirs.vit.embeddings.cls_token)
        ours.position_embedding.copy_(theirs.vit.embeddings.position_embeddings)
        for index, block in enumerate(ours.blocks):
            layer = f"{index}."
            parts = [
                find(
                    f"{layer}attention.{long}",
                    f"{layer}attention.attention.{long}",
                    f"{layer}attention.{short}",
                )
                for long, short in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
            ]
            block.attention.query_key_value.weight.copy_(torch.cat([part.weight for part in parts]))
            block.attention.query_key_value.bias.copy_(torch.cat([part.bias for part in parts]))
            pairs += [
                (block.attention_norm, find(f"{layer}layernorm_before")),
                (block.mlp_norm, find(f"{layer}layernorm_after")),
                (
                    block.attention.projection,
                    find(f"{layer}attention.output.dense", f"{layer}attention.o_proj"),
                ),
                (block.mlp.expansion, find(f"{layer}intermediate.dense", f"{layer}mlp.fc1")),
                (block.mlp.projection, find(f"{index}.output.dense", f"{layer}mlp.fc2")),
            ]
        for mine, other in pairs:
            mine.load_state_dict(other.state_dict())
        images = random_images()
        expected = theirs(images).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_naive_equals_sdpa(dtype, tolerance):
    sdpa = build(TINY).to(dtype)
    naive = ViT(dataclasses.replace(TINY, attention="naive")).to(dtype)
    naive.load_state_dict(sdpa.state_dict())
    images, labels = random_images().to(dtype), torch.tensor([3, 1, 4])
    torch.testing.assert_close(naive(images), sdpa(images), rtol=0, atol=tolerance)
    for model in (naive, sdpa):
        model(images, labels).backward()
    for (name, ours), theirs in zip(naive.named_parameters(), sdpa.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=tolerance, msg=name)


def test_naive_dropout_is_sdpa_dropout():
    torch.manual_seed(0)
    layer = SelfAttention(dataclasses.replace(TINY, dropout=0.5))
    x = torch.randn(2, 17, TINY.hidden)
    outputs = []
    for attention in vit.ATTENTIONS:
        layer.attention = attention
        torch.manual_seed(3)
        # The math backend is SDPA's definition, dropout included.
        with sdpa_kernel(SDPBackend.MATH):
            outputs.append(layer(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)
    assert not torch.allclose(outputs[0], layer.eval()(x))


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_dropout_is_off_in_evaluation_and_on_in_training(attention):
    model = build(dataclasses.replace(TINY, dropout=0.3, attention=attention))
    images = random_images()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_every_position_sees_every_other():
    block = build(TINY).blocks[0].eval()
    torch.manual_seed(0)
    x = torch.randn(1, 17, TINY.hidden)
    changed = x.clone()
    changed[:, 16] += torch.randn(TINY.hidden)
    with torch.no_grad():
        assert ((block(changed) - block(x)).abs().amax(dim=(0, 2)) > 1e-5).all()


def test_patches_are_read_row_by_row():
    """The position of a patch is its place in the image, so a mix-up of rows and columns would show
    here.
    """
    model = build(TINY)
    images = torch.zeros(1, 2, 16, 16)
    images[:, :, 0:4, 4:8] = 1  # the second patch of the first row
    patches = model.patch_embedding(images).flatten(2).transpose(1, 2)
    assert patches.shape == (1, 16, TINY.hidden)
    changed = (patches - model.patch_embedding.bias).abs().amax(dim=(0, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [1]
    assert TINY.sequence_length == 17


def test_blocks_take_and_return_hidden():
    model = build(TINY)
    assert isinstance(model.blocks, torch.nn.ModuleList) and len(model.blocks) == TINY.layers
    assert all(isinstance(block, Block) for block in model.blocks)
    x = torch.randn(3, 17, TINY.hidden)
    assert model.blocks[0](x).shape == x.shape
    assert model.features(random_images()).shape == (3, TINY.hidden)


def test_loss_is_a_scalar():
    model = build(TINY)
    images, labels = random_images(), torch.tensor([3, 1, 4])
    loss = model(images, labels)
    assert loss.shape == ()
    assert model(images).shape == (3, 10)
    torch.testing.assert_close(loss, F.cross_entropy(model(images), labels))


def test_same_seed_same_model():
    first, again, other = build(TINY), build(TINY), build(TINY, seed=1)
    assert equal(first.parameters(), again.parameters())
    assert not torch.equal(first.class_token, other.class_token)


def test_it_learns():
    model = build(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels = random_images(batch=10), torch.arange(10)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(images, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"hidden": 130, "heads": 4}, ValueError, "divisible by heads"),
        ({"patch_size": 5}, ValueError, "divisible by patch_size"),
        ({"patch_size": 64}, ValueError, "divisible by patch_size"),
        ({"attention": "flash"}, ValueError, "sdpa, naive"),
        ({"dropout": 1.5}, ValueError, "dropout"),
        ({"classes": 0}, ValueError, "classes"),
        ({"layers": 2.0}, TypeError, "layers"),
    ],
)
def test_wrong_sizes_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        vit.small(**change)


@pytest.mark.parametrize(
    "images, error, words",
    [
        (torch.zeros(3, 2, 16, 16, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(3, 1, 16, 16), ValueError, r"\(3, 1, 16, 16\)"),
        (torch.zeros(3, 2, 32, 32), ValueError, r"\(3, 2, 32, 32\)"),
        (torch.zeros(2, 16, 16), ValueError, r"\(2, 16, 16\)"),
        (torch.zeros(0, 2, 16, 16), ValueError, "at least one image"),
    ],
)
def test_wrong_images_are_refused(images, error, words):
    model = build(TINY)
    with pytest.raises(error, match=words):
        model(images)
    with pytest.raises(error, match=words):
        model(images, torch.zeros(images.shape[0], dtype=torch.int64))


@pytest.mark.parametrize(
    "labels, error",
    [
        (torch.zeros(4, dtype=torch.int64), ValueError),
        (torch.zeros(3, 10, dtype=torch.int64), ValueError),
        (torch.zeros(3), TypeError),
    ],
)
def test_wrong_labels_are_refused(labels, error):
    with pytest.raises(error, match="labels"):
        build(TINY)(random_images(), labels)
