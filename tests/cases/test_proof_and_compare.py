"""What people ask about a proof and a comparison, each with its true answer."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memlab.compare import compare
from memlab.measure import measure
from memlab.proof import FirstStep, first_step, gradient_difference
from memlab.techniques.compilation_and_fusion import apply_fused_loss
from tests.helpers import largest_difference, small_gpt2

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


#: Of a transformer without dropout.
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert(transformers):
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=200, **SIZES))
    tokens, targets = torch.randint(200, (2, 8, 32))
    return model, lambda part: model(input_ids=tokens[part], labels=targets[part]).loss


def vit(transformers):
    config = transformers.ViTConfig(image_size=32, patch_size=4, num_labels=10, **SIZES)
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


# What a comparison says ---------------------------------------------------------------------------


class Basic(nn.Module):
    """ResNet's block of two convolutions."""

    def __init__(self, channels, width, stride, activation):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            activation(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.activation = activation()
        self.beside = nn.Sequential()
        if channels != width:
            convolution = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.beside = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, images):
        return self.activation(self.inner(images) + self.beside(images))


def resnet18(activation=nn.ReLU):
    """He et al., "Deep Residual Learning for Image Recognition" (2015), arXiv:1512.03385, table 1,
    for ten classes.
    """
    stem = (
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        activation(),
        nn.MaxPool2d(3, 2, padding=1),
    )
    stages = []
    for channels, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        first = Basic(channels, width, 1 if channels == width else 2, activation)
        stages.append(nn.Sequential(first, Basic(width, width, 1, activation)))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(*stem, *stages, *head)


def train_resnet(trained=None):
    model = resnet18()
    if trained == "first half":
        model[6:].requires_grad_(False)
    if trained == "norms":
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(True)
        model.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    images, targets = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    for _ in range(2):
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def test_frozen_layers_in_a_resnet_keep_their_inputs(objects_frozen):
    trained, half, norms = (measure(train_resnet, trained=t) for t in (None, "first half", "norms"))
    assert trained.activations_at_backward == 14_145_356
    # The last linear layer lets go of its input, 8 x 512 floats. The frozen convolutions do not,
    # nor do the norms: the gradient of what comes before goes through them.
    assert half.activations_at_backward == 14_128_972 == 14_145_356 - 4 * 8 * 512
    assert norms.activations_at_backward == 14_090_572
    verdict = compare(trained, half).verdict
    assert "gradients −" in verdict
    assert verdict.endswith("activations when backward begins −16.00 KiB")


class KeepsOnlyItsWeight(torch.autograd.Function):
    """A convolution that is frozen: the gradient of what came in needs its weight alone."""

    @staticmethod
    def forward(ctx, images, weight, stride, padding):
        ctx.save_for_backward(weight)
        ctx.options = images.shape, stride, padding
        return F.conv2d(images, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, gradient):
        [weight] = ctx.saved_tensors
        shape, stride, padding = ctx.options
        return F.grad.conv2d_input(shape, weight, gradient, stride, padding), None, None, None


def lean_convolution(module, images):
    return KeepsOnlyItsWeight.apply(images, module.weight, module.stride, module.padding)


def lean_norm(module, images):
    """An evaluating norm as what it computes: a factor and a summand a channel."""
    scale = module.weight / (module.running_var + module.eps).sqrt()
    shift = module.bias - module.running_mean * scale
    return images * scale[:, None, None] + shift[:, None, None]


def train_the_first_convolution(activation, lean):
    """All that comes after it is frozen, and only hands gradients on."""
    torch.manual_seed(0)
    model = resnet18(activation).requires_grad_(False).eval()
    model[0].requires_grad_(True)
    for module in model[1:].modules() if lean else ():
        if isinstance(module, nn.Conv2d):
            module.forward = functools.partial(lean_convolution, module)
        if isinstance(module, nn.BatchNorm2d):
            module.forward = functools.partial(lean_norm, module)
    images, targets = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    loss = F.cross_entropy(model(images), targets)
    loss.backward()
    yield loss


@pytest.mark.parametrize(("activation", "share"), [(nn.ReLU, 0.504), (nn.SiLU, 0.458)])
def test_frozen_layers_that_keep_no_input_halve_a_resnet(activation, share, objects_frozen):
    """The share depends on the activations: a ReLU keeps what the next convolution keeps anyway.

    (Hugging Face's ResNet has a ReLU in each block whatever `hidden_act` says: with "silu" it is
    50.8 % there. Beside the batch, which counts as such.)
    """
    both = {"activation": activation}
    usual, lean = (
        measure(train_the_first_convolution, steps=1, lean=lean, **both).activations_at_backward
        for lean in (False, True)
    )
    assert lean / usual == pytest.approx(share, abs=0.0005)
    steps = [first_step(train_the_first_convolution, lean=lean, **both) for lean in (False, True)]
    assert gradient_difference(*steps) < 1e-5


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, number):
        return torch.full((2**15,), float(number)), number % 10


def train_from_a_loader(workers):
    model = nn.Linear(2**15, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for pictures, targets in torch.utils.data.DataLoader(Pictures(), 32, num_workers=workers):
        loss = F.cross_entropy(model(pictures), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def test_what_workers_send_is_not_saved_but_elsewhere():
    here, workers = (measure(train_from_a_loader, workers=count) for count in (0, 2))
    batch = 32 * 4 * 2**15
    assert workers.outside_shared_bytes >= 2 * batch  # this one and the next
    compared = compare(here, workers)
    assert " went to shared memory" in compared.verdict and "× less" not in compared.verdict
    assert compared.to_frame()["× less"].isna().tolist() == [False, True]


def train_gpt2(mode=True, checkpointing=False):
    model = small_gpt2(n_layer=4, use_cache=False).train(mode)
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens = torch.randint(400, (4, 32))
    for _ in range(2):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        model.zero_grad()
        yield loss


def train_round_the_head(fused_loss=False, autocast=False):
    """As trainers do that compute the logits from the head's weight themselves."""
    model = small_gpt2(use_cache=False)
    if fused_loss:
        apply_fused_loss(model)
    tokens, targets = torch.randint(400, (2, 4, 32))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = model.transformer(input_ids=tokens).last_hidden_state
            logits = F.linear(features, model.lm_head.weight)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        model.zero_grad()
        yield loss


def test_a_loss_that_goes_round_the_head_it_was_applied_to(objects_frozen):
    plain, fused = (measure(train_round_the_head, fused_loss=fused) for fused in (False, True))
    saved_nothing = compare(plain, fused).verdict
    assert "the tensors seen were in FP32" in saved_nothing
    assert saved_nothing.endswith("what was applied to lm_head was never called.")
    rounded = measure(train_round_the_head, autocast=True)
    assert "the tensors seen were in BF16 and FP32" in compare(rounded, rounded).verdict


def test_checkpointing_that_is_switched_on_in_eval_mode(objects_frozen):
    def verdict(mode):
        on_and_off = [
            measure(train_gpt2, mode=mode, checkpointing=checkpointing)
            for checkpointing in (False, True)
        ]
        return compare(*on_and_off).verdict

    saved_nothing = verdict(mode=False)
    assert "Is the switch on? 0 of 4 blocks were recomputed in backward" in saved_nothing
    assert saved_nothing.endswith("the model was in eval() mode.")
    assert "Is the switch on?" not in verdict(mode=True)
