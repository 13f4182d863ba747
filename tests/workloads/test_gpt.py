import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from memlab.measure import measure
from memlab.techniques.mixed_precision import apply_mixed_precision
from memlab.workloads import gpt
from memlab.workloads.gpt import GPT, Block, CausalSelfAttention, GPTConfig
from tests.helpers import count_parameters, equal

TINY = gpt.tiny(context_length=16, layers=2)


def build(config, seed=0):
    torch.manual_seed(seed)
    return GPT(config)


def random_tokens(batch=3, sequence=16, vocabulary=256):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (batch, sequence), generator=generator)


@pytest.mark.parametrize(
    "geometry, published",
    [
        (gpt.gpt2_124m, 124_439_808),
        (gpt.gpt2_350m, 354_823_168),
        (gpt.gpt2_774m, 774_030_080),
        (gpt.gpt2_1558m, 1_557_611_200),
    ],
)
def test_parameter_counts_are_the_published_ones(geometry, published):
    with torch.device("meta"):
        model = GPT(geometry())
    assert count_parameters(model) == published
    assert geometry().parameter_count == published


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_follows_the_options(bias, tied):
    config = gpt.tiny(bias=bias, tied_embeddings=tied)
    model = build(config)
    assert count_parameters(model) == config.parameter_count
    names = [name for name, _ in model.named_parameters()]
    assert any(name.endswith("bias") for name in names) is bias
    assert ("head.weight" in names) is not tied


def test_geometries_take_changes():
    config = gpt.gpt2_124m(attention="naive", dropout=0.1)
    assert config == dataclasses.replace(gpt.gpt2_124m(), attention="naive", dropout=0.1)
    with pytest.raises(TypeError):
        gpt.gpt2_124m(width=3)


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_equals_hugging_face(attention, transformers):
    config = GPTConfig(101, 32, layers=3, heads=4, hidden=48, attention=attention)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=101, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    ).eval()
    torch.manual_seed(0)
    # Every parameter drawn anew: biases of zero and norms of one would hide a name mixed up.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    ours = GPT(config).eval()
    source = theirs.state_dict()
    renamed = {
        "token_embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
        "attention_norm": "ln_1",
        "attention.query_key_value": "attn.c_attn",
        "attention.projection": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.expansion": "mlp.c_fc",
        "mlp.projection": "mlp.c_proj",
    }
    weights = {}
    for name in ours.state_dict():
        module, kind = name.rsplit(".", 1)
        if module.startswith("blocks."):
            _, index, inner = module.split(".", 2)
            weight = source[f"transformer.h.{index}.{renamed[inner]}.{kind}"]
            # Hugging Face keeps GPT-2's linear layers as (inputs, outputs).
            weights[name] = weight.t() if weight.ndim == 2 else weight
        else:
            weights[name] = source[f"{renamed[module]}.{kind}"]
    ours.load_state_dict(weights)
    tokens = random_tokens(sequence=32, vocabulary=101)
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        logits = ours(tokens)
        assert logits.shape == (3, 32, 101)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        targets = torch.roll(tokens, -1, 1)
        torch.testing.assert_close(
            ours(tokens, targets),
            F.cross_entropy(expected.flatten(0, 1), targets.flatten()),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_naive_equals_sdpa(dtype, tolerance):
    sdpa = build(TINY).to(dtype)
    naive = GPT(dataclasses.replace(TINY, attention="naive")).to(dtype)
    naive.load_state_dict(sdpa.state_dict())
    tokens = random_tokens()
    torch.testing.assert_close(naive(tokens), sdpa(tokens), rtol=0, atol=tolerance)
    for model in (naive, sdpa):
        model(tokens, tokens.roll(-1, 1)).backward()
    for (name, ours), theirs in zip(naive.named_parameters(), sdpa.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=tolerance, msg=name)


def test_naive_dropout_is_sdpa_dropout():
    config = gpt.tiny(dropout=0.5)
    torch.manual_seed(0)
    sdpa = CausalSelfAttention(config)
    naive = copy.deepcopy(sdpa)
    naive.attention = "naive"
    x = torch.randn(2, 16, config.hidden)
    outputs = []
    for layer in (sdpa, naive):
        torch.manual_seed(3)
        # The math backend is SDPA's definition, dropout included.
        with sdpa_kernel(SDPBackend.MATH):
            outputs.append(layer(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)
    for layer in (sdpa, naive):
        dropped = layer.train()(x)
        quiet = layer.eval()(x)
        assert not torch.allclose(dropped, quiet)
        assert torch.equal(quiet, layer(x))


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_dropout_is_off_in_evaluation_and_on_in_training(attention):
    model = build(dataclasses.replace(TINY, dropout=0.3, attention=attention))
    tokens = random_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_the_future_does_not_change_the_past(attention):
    model = build(dataclasses.replace(TINY, attention=attention)).eval()
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(dim=(0, 2)).min() > 1e-3
    # And the past does change the future.
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 256
    with torch.no_grad():
        assert (model(changed) - before)[:, 15].abs().max() > 1e-5


def saved_scores(attention, dropout=0.0):
    """How many tensors of (batch, heads, sequence, sequence) autograd saves."""
    model = build(gpt.tiny(layers=1, attention=attention, dropout=dropout))
    size = 2 * 2 * 64 * 64
    storages = {}

    def pack(tensor):
        if tensor.is_floating_point() and tensor.numel() == size and tensor.shape[-2:] == (64, 64):
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = random_tokens(batch=2, sequence=64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, tokens)
    loss.backward()
    return len(storages)


def test_naive_attention_keeps_the_scores_and_sdpa_does_not():
    assert saved_scores("naive") == 1
    assert saved_scores("sdpa") == 0


def test_loss_is_a_scalar_and_keeps_no_logits():
    model = build(TINY)
    tokens, targets = random_tokens(), random_tokens().roll(-1, 1)
    loss = model(tokens, targets)
    assert loss.shape == ()
    logits = model(tokens)
    torch.testing.assert_close(loss, F.cross_entropy(logits.view(-1, 256), targets.view(-1)))
    # Weights of standard deviation 0.02 know nothing yet.
    assert abs(loss.item() - math.log(256)) < 0.2


def test_blocks_take_and_return_hidden_and_make_the_model():
    model = build(TINY).eval()
    assert isinstance(model.blocks, torch.nn.ModuleList) and len(model.blocks) == TINY.layers
    assert all(isinstance(block, Block) for block in model.blocks)
    tokens = random_tokens()
    x = model.token_embedding(tokens) + model.position_embedding.weight[:16]
    for block in model.blocks:
        x = block(x)
        assert x.shape == (3, 16, TINY.hidden)
    torch.testing.assert_close(model.features(tokens), model.final_norm(x))
    torch.testing.assert_close(model(tokens), model.final_norm(x) @ model.token_embedding.weight.T)


def test_tied_weights_are_one_storage():
    tied, untied = build(TINY), build(dataclasses.replace(TINY, tied_embeddings=False))
    for model in (tied, copy.deepcopy(tied), tied.to(torch.float64)):
        assert model.head.weight is model.token_embedding.weight
        assert model.head.weight.data_ptr() == model.token_embedding.weight.data_ptr()
    assert untied.head.weight.data_ptr() != untied.token_embedding.weight.data_ptr()


def test_same_seed_same_model():
    first, again, other = build(TINY), build(TINY), build(TINY, seed=1)
    assert equal(first.parameters(), again.parameters())
    assert not torch.equal(first.token_embedding.weight, other.token_embedding.weight)


def test_weights_are_drawn_as_gpt2_draws_them():
    model = build(gpt.small())
    block = model.blocks[0]
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.expansion.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (block.attention.projection, block.mlp.projection):
        assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(12), rel=0.05)
        assert projection.bias.abs().max() == 0


def test_it_learns():
    model = build(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = random_tokens()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"hidden": 130, "heads": 4}, ValueError, "divisible by heads"),
        ({"attention": "flash"}, ValueError, "sdpa, naive"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"layers": 0}, ValueError, "layers"),
        ({"vocabulary_size": -1}, ValueError, "vocabulary_size"),
        ({"hidden": 64.0}, TypeError, "hidden"),
        ({"context_length": True}, TypeError, "context_length"),
    ],
)
def test_wrong_sizes_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        gpt.tiny(**change)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.layers = 3


@pytest.mark.parametrize(
    "tokens, error, words",
    [
        (torch.zeros(2, 17, dtype=torch.int64), ValueError, "17 positions, but the model knows 16"),
        (torch.zeros(2, 16), TypeError, "float32"),
        (torch.zeros(2, 16, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(16, dtype=torch.int64), ValueError, r"\(batch, sequence\)"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "at least one token"),
        (torch.zeros(0, 16, dtype=torch.int64), ValueError, "at least one token"),
        (torch.full((2, 16), 256), IndexError, None),
    ],
)
def test_wrong_tokens_are_refused(tokens, error, words):
    model = build(TINY)
    with pytest.raises(error, match=words):
        model(tokens)
    with pytest.raises(error, match=words):
        model(tokens, torch.zeros(tokens.shape, dtype=torch.int64))


@pytest.mark.parametrize(
    "targets, error",
    [
        (torch.zeros(3, 15, dtype=torch.int64), ValueError),
        (torch.zeros(48, dtype=torch.int64), ValueError),
        (torch.zeros(3, 16), TypeError),
        (torch.zeros(3, 16, dtype=torch.int32), TypeError),
    ],
)
def test_wrong_targets_are_refused(targets, error):
    with pytest.raises(error, match="targets"):
        build(TINY)(random_tokens(), targets)


def measured_activations(config, batch, sequence, mixed_precision):
    """The ledger's activations at the peak of a training step."""

    def build_run():
        model = build(config)
        if mixed_precision:
            apply_mixed_precision(model, torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        tokens = random_tokens(batch, sequence, config.vocabulary_size)
        targets = tokens.roll(-1, 1)

        def step():
            loss = model(tokens, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    run = measure(build_run, device="cpu")
    assert run.phase == "backward"  # else the activations are not all there
    return run.columns["activations"]


@pytest.mark.parametrize("batch", [4, 12])
@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_activation_bytes_are_the_ledgers(attention, mixed_precision, batch):
    config = gpt.tiny(layers=2, attention=attention)
    counted = gpt.activation_bytes(config, batch, 64, mixed_precision=mixed_precision)
    assert counted == measured_activations(config, batch, 64, mixed_precision)


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_activation_bytes_follow_the_options(mixed_precision):
    """Other sizes, no bias, an output layer of its own."""
    config = GPTConfig(101, 40, layers=3, heads=4, hidden=48, bias=False, tied_embeddings=False)
    counted = gpt.activation_bytes(config, 32, 36, mixed_precision=mixed_precision)
    assert counted == measured_activations(config, 32, 36, mixed_precision)


@pytest.mark.parametrize(
    "config, sizes, words",
    [
        (gpt.tiny(dropout=0.1), (4, 64), "dropout must be 0, but it is 0.1"),
        (gpt.tiny(), (0, 64), "batch_size must be at least 1"),
        (gpt.tiny(), (4, 65), "sequence_length from 1 to 64"),
        (gpt.tiny(), (4, 0), "sequence_length from 1 to 64"),
    ],
)
def test_activation_bytes_that_cannot_be_counted_are_refused(config, sizes, words):
    with pytest.raises(ValueError, match=words):
        gpt.activation_bytes(config, *sizes)
