"""What people ask about a proof and a comparison, each with its true answer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memlab.proof import FirstStep, first_step, gradient_difference
from tests.helpers import largest_difference

# Gradients that are zero in theory ----------------------------------------------------------------


class UNet(nn.Module):
    """Two levels. Every convolution but the last has a bias that the norm behind it takes off."""

    def __init__(self, width=8):
        super().__init__()
        self.down = self.convolution(3, width)
        self.deep = self.convolution(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Sequential(self.convolution(2 * width, width), nn.Conv2d(width, 2, 1))

    @staticmethod
    def convolution(channels, width):
        norm = nn.GroupNorm(width, width)
        return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), norm, nn.ReLU())

    def forward(self, images):
        """(batch, 3, height, width) to (batch, 2, height, width)."""
        fine = self.down(images)
        coarse = self.up(self.deep(F.max_pool2d(fine, 2)))
        return self.out(torch.cat((fine, coarse), dim=1))


def bert(transformers):
    config = transformers.BertConfig(
        vocab_size=200,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForMaskedLM(config)
    tokens, targets = torch.randint(200, (2, 8, 32))
    return model, lambda part: model(input_ids=tokens[part], labels=targets[part]).loss


def vit(transformers):
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    model = transformers.ViTForImageClassification(config)
    images, targets = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    return model, lambda part: model(pixel_values=images[part], labels=targets[part]).loss


def unet(transformers):
    model = UNet()
    images, targets = torch.randn(8, 3, 32, 32), torch.randint(2, (8, 32, 32))
    return model, lambda part: F.cross_entropy(model(images[part]), targets[part])


def first_gradients(make, transformers, *, micro_batches=1, autocast=False):
    def train():
        torch.manual_seed(0)
        model, loss_of = make(transformers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for part in torch.arange(8).chunk(micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(part) / micro_batches
            loss.backward()
        optimizer.step()
        yield loss

    return first_step(train)


@pytest.mark.parametrize(
    "make, zeros, in_bf16, smallest",
    [
        (bert, "self.key.bias", 0.04, 1e-4),
        (vit, "k_proj.bias", 0.04, 1e-2),
        # (A norm over a whole image rounds more.)
        (unet, ".0.bias", 0.6, 1e-2),
    ],
)
def test_zero_in_theory_is_no_difference_and_what_is_wrong_is_found(
    make, zeros, in_bf16, smallest, transformers, objects_frozen
):
    reference = first_gradients(make, transformers)
    accumulated = first_gradients(make, transformers, micro_batches=4)
    rounded = first_gradients(make, transformers, autocast=True)
    assert gradient_difference(reference, accumulated) < 1e-5
    assert gradient_difference(reference, rounded) < in_bf16

    # Divided by themselves, they would be all that one sees.
    names = [name for name in reference.gradients if name.endswith(zeros)]
    computed = [reference.gradients[name] for name in names]
    assert largest_difference([rounded.gradients[name] for name in names], computed) > 100

    largest = max(gradient.abs().max() for gradient in reference.gradients.values())
    shares = {n: (g.abs().max() / largest).item() for n, g in reference.gradients.items()}
    trained = [name for name, share in shares.items() if share > 1e-6]
    assert len(trained) == len(shares) - len(names)
    assert min(shares[name] for name in trained) < smallest  # small ones are among them
    for name in trained:
        for wrong in (2 * reference.gradients[name], 0 * reference.gradients[name]):
            other = FirstStep(None, reference.gradients | {name: wrong}, 0)
            assert gradient_difference(reference, other) > 1e-3, name
