"""Pruning: a cut model computes what the whole one does with the cut units at zero, and holds the
bytes counted by hand.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from memlab import measure
from memlab.techniques.pruning import prune_heads, prune_mlp, score_units, two_of_four
from memlab.workloads import gpt, vit
from tests.helpers import training_step


def gpt_model():
    model = gpt.GPT(gpt.tiny(layers=2, heads=4))
    tokens = torch.randint(256, (2, 16))
    return model, lambda model: model(tokens, tokens)


def vit_model():
    model = vit.ViT(vit.small(layers=2, hidden=32, heads=4))
    images, labels = torch.randn(2, 1, 32, 32), torch.tensor([1, 2])
    return model, lambda model: model(images.to(model.head.weight), labels)


def hugging_face(name, **sizes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50, pad_token_id=0, bos_token_id=0, eos_token_id=0, use_cache=False, **sizes
    )
    cls = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, cls)(config)
    tokens = torch.randint(1, 50, (2, 8))
    return model.eval(), lambda model: model(input_ids=tokens, labels=tokens).loss


def gpt2_model():
    return hugging_face("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=16)


def llama_model(name="Llama", **sizes):
    defaults = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    }
    return hugging_face(
        name, **{**defaults, "num_attention_heads": 8, "num_key_value_heads": 4, **sizes}
    )


# it norms queries and keys head by head, and its heads do not fill the hidden size
def qwen3_model():
    return llama_model("Qwen3", head_dim=16)


MODELS = [gpt_model, vit_model, gpt2_model, llama_model, qwen3_model]


def readers(model, kind):
    """By module name the layer that reads the units, and the axis of its weight along which they
    lie.
    """
    names = {
        "heads": ("projection", "c_proj", "o_proj"),
        "channels": ("projection", "c_proj", "down_proj"),
    }
    for name in score_units(model, kind):
        module = model.get_submodule(name)
        [layer] = [getattr(module, x) for x in names[kind] if hasattr(module, x)]
        yield name, layer, 1 if isinstance(layer, nn.Linear) else 0


def zeroed(model, kind, kept):
    """A copy of the model in which nothing is read from the units that are not kept."""
    model = copy.deepcopy(model)
    units = {name: len(score) for name, score in score_units(model, kind).items()}
    for name, layer, axis in readers(model, kind):
        mask = torch.zeros(units[name], dtype=torch.bool)
        mask[kept[name]] = True
        mask = mask.repeat_interleave(layer.weight.shape[axis] // len(mask)).to(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(mask if axis == 1 else mask[:, None])
    return model


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_a_cut_model_computes_what_the_whole_one_does_with_the_cut_units_at_zero(make, kind):
    torch.manual_seed(0)
    model, loss_of = make()
    model.double()
    with torch.no_grad():  # weights large enough for the heads to look at different things
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    whole = copy.deepcopy(model)
    scores = {name: torch.rand(len(score)) for name, score in score_units(model, kind).items()}
    kept = (prune_heads if kind == "heads" else prune_mlp)(model, 0.5, scores)
    for name, units in kept.items():
        assert len(units) == len(scores[name]) // 2 and units.tolist() == sorted(units.tolist())
        gone = set(range(len(scores[name]))) - set(units.tolist())
        assert scores[name][units].min() > max(scores[name][unit] for unit in gone)
    reference = zeroed(whole, kind, kept)
    ours, theirs = loss_of(model), loss_of(reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert abs(theirs - loss_of(whole)) > 1e-6  # the units mattered

    # The gradients of all that is as it was: the residual stream with its norms and embeddings.
    ours.backward()
    theirs.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    same = [n for n, p in model.named_parameters() if p.grad.shape == gradients[n].shape]
    assert len(same) >= 8
    for name in same:
        torch.testing.assert_close(
            model.get_parameter(name).grad, gradients[name], rtol=1e-9, atol=1e-12
        )
    # And of a layer that was cut: those of the kept units.
    for name, layer, axis in readers(reference, kind):
        full = (
            layer.weight.grad.movedim(axis, 0)
            .unflatten(0, (len(scores[name]), -1))[kept[name]]
            .flatten(0, 1)
        )
        cut = dict((n, x) for n, x, _ in readers(model, kind))[name].weight.grad.movedim(axis, 0)
        torch.testing.assert_close(cut, full, rtol=1e-9, atol=1e-12)


def test_parameters_and_attributes_are_counted_by_hand():
    config = gpt.tiny(layers=2, heads=4)
    model, h = gpt.GPT(config), config.hidden
    embedding = model.token_embedding.weight
    before = sum(p.nbytes for p in model.parameters())
    prune_heads(model, 0.25)
    prune_mlp(model, 0.5)
    # Three of four heads: query, key, value (with biases) and the projection (without).
    heads = 4 * (3 * (3 * h // 4) * (h + 1) + (3 * h // 4) * h)
    channels = 4 * (2 * h * (2 * h + 1))
    assert before - sum(p.nbytes for p in model.parameters()) == 2 * (heads + channels)
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        assert attention.heads == 1
        assert attention.query_key_value.weight.shape == (3 * h // 4, h)
        assert attention.query_key_value.out_features == 3 * h // 4
        assert (
            attention.projection.weight.shape == (h, h // 4)
            and attention.projection.in_features == h // 4
        )
        assert mlp.expansion.weight.shape == (2 * h, h) and mlp.projection.weight.shape == (
            h,
            2 * h,
        )
        assert all(
            p.untyped_storage().nbytes() == p.nbytes for p in block.parameters()
        )  # no slices
    assert (
        model.head.weight is model.token_embedding.weight is embedding
    )  # still tied, and as it was


def test_the_columns_of_a_training_run():
    """Everything that belongs to a cut unit goes: weights, gradients, moments, activations, to the
    byte.
    """

    def run(keep):
        def build():
            torch.manual_seed(0)
            model = gpt.GPT(gpt.tiny(layers=2, heads=4))
            if keep < 1:
                prune_heads(model, keep)
                prune_mlp(model, keep)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            data = torch.arange(2 * 64).reshape(2, 64) % 256

            return training_step(optimizer, lambda: model(data, data))

        return measure(build, device="cpu")

    whole, half, tokens, h, layers = run(1), run(0.5), 2 * 64, 64, 2
    # Of 16 hidden states a token, query, key, value and the heads' output (4) and the MLP's (8)
    # halve.
    cut = (
        layers * tokens * 4 * (2 + 4) * h + layers * tokens * 4 * 2
    )  # with two softmax denominators
    assert whole.columns["activations"] - half.columns["activations"] == cut
    weights = layers * 4 * (2 * h * h + 3 * h // 2 + 4 * h * h + 2 * h)
    # (The meter sees the scratch of the cutting too, so compare what the model holds after it.)
    assert whole.columns["parameters"] - half.columns["parameters"] == weights
    assert whole.columns["optimizer_state"] - half.columns["optimizer_state"] == 2 * weights


def test_magnitude_and_taylor_scores_are_what_they_say():
    torch.manual_seed(0)
    model, loss_of = gpt_model()
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    attention, d = model.blocks[1].attention, 64 // 4
    rows = [part * 64 + 2 * d + i for part in range(3) for i in range(d)]
    by_hand = (
        attention.query_key_value.weight[rows].square().sum()
        + attention.projection.weight[:, 2 * d : 3 * d].square().sum()
    )
    scores = score_units(model, "heads")
    assert list(scores) == ["blocks.0.attention", "blocks.1.attention"]
    torch.testing.assert_close(scores["blocks.1.attention"][2], by_hand.sqrt().detach())

    # To first order, by how much the loss changes when the unit is scaled down: a difference
    # quotient says the same.
    loss_of(model).backward()
    for kind, name, unit in (("heads", "blocks.0.attention", 1), ("channels", "blocks.1.mlp", 7)):
        score = score_units(model, kind, "taylor")[name][unit].item()
        layer = model.get_submodule(name).projection
        width = layer.in_features // len(score_units(model, kind)[name])
        ends = []
        for scale in (1 + 1e-5, 1 - 1e-5):
            twin = copy.deepcopy(model)
            with torch.no_grad():
                twin.get_submodule(name).projection.weight[
                    :, unit * width : (unit + 1) * width
                ] *= scale
                ends.append(loss_of(twin).item())
        assert score == pytest.approx(abs(ends[0] - ends[1]) / 2e-5, rel=1e-5) and score > 1e-7


def test_one_fraction_gives_one_shape_so_a_checkpoint_fits():
    model, loss_of = gpt_model()
    torch.manual_seed(7)
    other = gpt.GPT(model.config)
    for one in (model, other):
        prune_heads(one, 0.5)
        prune_mlp(one, 0.3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(loss_of(other), loss_of(model))
    assert model.blocks[0].mlp.expansion.out_features == round(0.3 * 256)


def test_pruning_twice_and_copies():
    torch.manual_seed(0)
    model, loss_of = gpt_model()
    once = copy.deepcopy(model)
    prune_heads(model, 0.5)
    twin = copy.deepcopy(model)
    assert torch.equal(loss_of(twin), loss_of(model))
    prune_heads(model, 0.5)
    prune_heads(once, 0.25)
    assert model.blocks[0].attention.heads == once.blocks[0].attention.heads == 1
    torch.testing.assert_close(
        loss_of(model), loss_of(once)
    )  # the lowest of the lowest go either way
    prune_mlp(once, 1e-9)
    assert once.blocks[0].mlp.expansion.out_features == 1  # one always stays
    ghost = weakref.ref(model)
    del model
    gc.collect()
    assert ghost() is None


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen2"]
)  # Qwen2's config has no head size until it needs one
def test_the_config_says_what_the_layers_are(name):
    torch.manual_seed(0)
    model, loss_of = llama_model(name)
    prune_heads(model, 0.5)
    prune_mlp(model, 0.75)
    config = model.config
    assert (config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (2, 4, 4)
    assert config.intermediate_size == 36 and config.hidden_size == 32
    layer = model.model.layers[1]
    assert layer.self_attn.q_proj.weight.shape == (
        16,
        32,
    ) and layer.self_attn.k_proj.weight.shape == (8, 32)
    assert layer.self_attn.o_proj.weight.shape == (32, 16) and layer.mlp.down_proj.weight.shape == (
        32,
        36,
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fresh = type(model)(type(config)(**config.to_dict())).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(loss_of(fresh), loss_of(model))


def test_gpt2_is_cut_along_the_right_axes_and_generates():
    torch.manual_seed(0)
    model, _ = gpt2_model()
    prune_heads(model, 0.25)
    prune_mlp(model, 0.5)
    block = model.transformer.h[0]
    assert block.attn.c_attn.weight.shape == (32, 24) and block.attn.c_attn.nf == 24
    assert block.attn.c_proj.weight.shape == (8, 32) and block.attn.c_proj.nx == 8
    assert (block.attn.num_heads, block.attn.split_size, block.attn.head_dim) == (1, 8, 8)
    assert block.mlp.c_fc.weight.shape == (32, 64) and model.config.n_inner == 64
    tokens = torch.randint(1, 50, (1, 4))
    cached = model.generate(
        tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True
    )
    again = model.generate(
        tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False
    )
    assert cached.shape == (1, 8) and torch.equal(cached, again)


def test_an_optimizer_from_before_refuses_and_one_from_after_steps():
    model, loss_of = gpt_model()
    before = torch.optim.AdamW(model.parameters(), lr=1e-3)
    elsewhere = nn.Linear(2, 2)
    untouched = torch.optim.SGD(elsewhere.parameters(), lr=0.1)
    prune_mlp(model, 0.5)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="holds 6 parameters that pruning has replaced"):
        before.step()
    after = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weight = model.blocks[0].mlp.expansion.weight
    old = weight.detach().clone()
    after.step()
    assert not torch.equal(weight, old)
    elsewhere(torch.ones(1, 2)).sum().backward()
    untouched.step()
    gone = weakref.ref(before)
    del before
    assert gone() is None


def test_an_optimizer_of_a_list_from_before_is_refused():
    model, _ = gpt_model()
    saved = list(model.parameters())
    groups = [{"params": saved[:4]}, {"params": saved[4:], "weight_decay": 0.0}]
    prune_mlp(model, 0.5)
    for parameters in (saved, groups):
        with pytest.raises(ValueError, match="Pruning has replaced this parameter"):
            torch.optim.AdamW(parameters)
    torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_pruned_model_can_be_copied_and_pickled_and_pruned_again(duplicate):
    model, loss_of = gpt_model()
    prune_heads(model, 0.5)
    twin = duplicate(model)
    assert type(twin.blocks[0].attention) is gpt.CausalSelfAttention
    assert torch.equal(loss_of(twin), loss_of(model))
    prune_heads(twin, 0.5)
    assert twin.blocks[0].attention.heads == 1 and model.blocks[0].attention.heads == 2
    loss_of(twin).backward()


def test_pruning_under_a_lora_says_what_to_do_and_after_merging_it_works():
    peft = pytest.importorskip("peft")
    model, loss_of = llama_model()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    expected = loss_of(adapted)
    for function in (prune_heads, prune_mlp):
        with pytest.raises(ValueError, match=r"peft.tuners.lora.layer.Linear.*merge_and_unload"):
            function(adapted, 0.5)
    assert torch.equal(loss_of(adapted), expected)
    merged = adapted.merge_and_unload()
    prune_heads(merged, 0.5)
    prune_mlp(merged, 0.5)
    assert torch.isfinite(loss_of(merged))


def test_frozen_weights_stay_frozen_and_dtypes_stay():
    model = gpt.GPT(gpt.tiny(layers=1)).bfloat16().requires_grad_(False)
    prune_heads(model, 0.5)
    prune_mlp(model, 0.5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_without_biases_and_with_dropout():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.tiny(layers=1, heads=4, bias=False, dropout=0.5))
    tokens = torch.randint(256, (1, 8))
    prune_heads(model, 0.5)
    assert model.training and model.blocks[0].attention.training
    first, second = model(tokens), model(tokens)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_a_mask_of_two_in_four():
    weight = torch.tensor([[1.0, -4, 2, 3, 0, 0, 0, 0], [5, 6, -7, 8, -1, 0, 2, 1.5]])
    mask = two_of_four(weight)
    assert mask.dtype == torch.bool and mask.unflatten(1, (-1, 4)).sum(2).eq(2).all()
    assert mask[0, :4].tolist() == [False, True, False, True]
    assert mask[1].tolist() == [False, False, True, True, False, False, True, True]


def test_bad_input_is_refused_before_anything_is_cut():
    model, loss_of = gpt_model()
    expected = loss_of(model)
    for fraction in (0, -0.5, 1.5, True, "half"):
        with pytest.raises(ValueError, match="keep_fraction must be above 0 and at most 1"):
            prune_heads(model, fraction)
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        prune_heads([model], 0.5)
    with pytest.raises(ValueError, match="holds no heads to cut"):
        prune_heads(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="holds no channels to cut"):
        prune_mlp(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match='kind must be "heads" or "channels"'):
        score_units(model, "layers")
    with pytest.raises(ValueError, match='criterion must be "magnitude" or "taylor"'):
        score_units(model, "heads", "l1")
    with pytest.raises(ValueError, match="has no gradient: call loss.backward"):
        score_units(model, "heads", "taylor")
    scores = score_units(model, "heads")
    with pytest.raises(ValueError, match=r"scores must hold \(4,\) for blocks.1.attention"):
        prune_heads(model, 0.5, {**scores, "blocks.1.attention": torch.ones(3)})
    with pytest.raises(ValueError, match="scores must hold"):
        prune_mlp(model, 0.5, scores)
    with pytest.raises(ValueError, match="in a multiple of 4"):
        two_of_four(torch.ones(4, 6))
    weight = model.blocks[1].mlp.expansion.weight.detach().clone()
    prune.l1_unstructured(model.blocks[1].mlp.expansion, "weight", 0.5)
    with pytest.raises(ValueError, match="blocks.1.mlp holds a masked weight"):
        prune_mlp(model, 0.5)
    prune.remove(model.blocks[1].mlp.expansion, "weight")
    model.blocks[1].mlp.expansion.weight = model.blocks[0].mlp.expansion.weight
    with pytest.raises(ValueError, match="share one weight"):
        prune_mlp(model, 0.5)
    assert (
        model.blocks[0].mlp.expansion.out_features == 256 and model.blocks[0].attention.heads == 4
    )
    model.blocks[1].mlp.expansion.weight = nn.Parameter(weight)
    assert torch.equal(loss_of(model), expected)
    naive = gpt.GPT(gpt.tiny(layers=1, attention="naive"))
    with pytest.raises(ValueError, match="computed by SDPA"):
        prune_heads(naive, 0.5)
    odd = gpt.GPT(gpt.tiny(layers=1))
    odd.blocks[0].attention.forward = lambda x: x
    with pytest.raises(ValueError, match="something else than softmax attention"):
        prune_heads(odd, 0.5)


@pytest.mark.gpu
def test_on_a_gpu_the_cut_model_is_the_zeroed_one_and_its_bytes_are_gone():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.tiny(layers=2, heads=4)).cuda()
    tokens = torch.randint(256, (2, 16), device="cuda")
    whole = copy.deepcopy(model)
    kept = prune_heads(model, 0.5)
    reference = zeroed(whole, "heads", {name: units.cpu() for name, units in kept.items()})
    torch.testing.assert_close(model(tokens), reference(tokens), rtol=1e-3, atol=1e-4)
    assert sum(
        p.untyped_storage().nbytes() for p in model.blocks[0].attention.parameters()
    ) == 4 * (3 * 32 * 65 + 64 * 32 + 64)


@pytest.mark.gpu
def test_on_a_gpu_two_of_four_is_compressed_to_nine_sixteenths():
    if torch.cuda.get_device_capability() < (8, 0) or not torch.backends.cusparselt.is_available():
        pytest.skip("2:4 needs compute capability 8.0 and cuSPARSELt")
    weight = torch.randn(1024, 1024, device="cuda", dtype=torch.float16)
    weight *= two_of_four(weight)
    x = torch.randn(128, 1024, device="cuda", dtype=torch.float16)
    before = torch.cuda.memory_allocated()
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    assert (torch.cuda.memory_allocated() - before) / weight.nbytes == pytest.approx(
        9 / 16, rel=0.01
    )
    torch.testing.assert_close(nn.functional.linear(x, sparse), x @ weight.T, rtol=1e-2, atol=0.5)
