"""Chunked input: with a cache of keys and values the outputs and gradients of the whole, for our
GPT and models of Hugging Face; feed-forward layers and losses in chunks; bytes by formula; and what
would go wrong is refused."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlab import measure
from memlab.techniques.chunked_input import (
    KVCache,
    apply_chunked_feed_forward,
    forward_chunk,
    forward_in_chunks,
    in_chunks,
    kv_cache_bytes,
)
from memlab.workloads import gpt, vit
from tests.helpers import largest_difference, small_gpt2, small_llama

CONFIG = gpt.tiny(layers=2)  # a context of 64 tokens, 2 heads of 32
TOKENS = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
TARGETS = TOKENS.roll(-1, 1).contiguous()


def new_model(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return gpt.GPT(config).eval()


def read(model, tokens, cache, chunk_size, positions="learned", **options):
    positions = model.position_embedding if positions == "learned" else positions
    outputs = list(
        forward_in_chunks(model, tokens, cache, chunk_size, positions=positions, **options)
    )
    return torch.cat([getattr(output, "logits", output) for output in outputs], 1)


def windowed(model, tokens, window):
    """The whole text at once, under a mask in which a token sees itself and the `window - 1` before
    it.
    """
    count = tokens.shape[1]
    band = torch.ones(count, count, dtype=torch.bool).tril().triu(1 - window)
    x = model.token_embedding(tokens) + model.position_embedding(torch.arange(count))
    for block in model.blocks:
        joint = block.attention.query_key_value(block.attention_norm(x)).chunk(3, dim=2)
        heads = [part.unflatten(2, (block.attention.heads, -1)).transpose(1, 2) for part in joint]
        y = F.scaled_dot_product_attention(*heads, attn_mask=band)
        x = x + block.attention.projection(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.mlp_norm(x))
    return model.head(model.final_norm(x))


# --- The outputs of the whole ---------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [40, 64, None])
@pytest.mark.parametrize("chunk_size", [1, 7, 20, 40, 100])  # 7: the last chunk is short
@torch.no_grad()
def test_outputs_are_those_of_the_whole(capacity, chunk_size):
    model = new_model()
    cache = KVCache(capacity)
    assert largest_difference(read(model, TOKENS, cache, chunk_size), model(TOKENS)) < 1e-5
    assert cache.length == 40
    assert not model.position_embedding._forward_pre_hooks  # nothing is left on the model


@torch.no_grad()
def test_without_the_cache_only_the_first_chunk_is_right():
    model = new_model()
    apart = torch.cat([model(part) for part in TOKENS.split(10, 1)], 1)
    assert largest_difference(apart[:, :10], model(TOKENS)[:, :10]) < 1e-6
    assert largest_difference(apart[:, 10:], model(TOKENS)[:, 10:]) > 0.05


@pytest.mark.parametrize("chunk_size", [1, 6, 8, 25, 40])
@torch.no_grad()
def test_a_window_is_that_of_a_mask_over_the_whole(chunk_size):
    model, window = new_model(), 8
    cache = KVCache(window - 1 + chunk_size, window=window)
    expected = windowed(model, TOKENS, window)
    assert largest_difference(read(model, TOKENS, cache, chunk_size), expected) < 1e-5
    assert cache.nbytes == kv_cache_bytes(
        window - 1 + chunk_size, layers=2, heads=2, width=32, batch_size=2
    )
    assert largest_difference(expected, model(TOKENS)) > 0.01
    wide = read(model, TOKENS, KVCache(40, window=100), chunk_size)
    assert largest_difference(wide, model(TOKENS)) < 1e-5


@torch.no_grad()
def test_a_window_in_eight_bits_moves_its_scales_too():
    model = new_model()
    given = read(model, TOKENS, KVCache(7 + 6, window=8, dtype=torch.int8), 6)
    assert 0 < largest_difference(given, windowed(model, TOKENS, 8)) < 0.02


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.int8, 0.02), (torch.bfloat16, 0.02), (torch.float64, 1e-5)]
)
@torch.no_grad()
def test_a_cache_of_another_dtype_rounds_and_the_chunk_does_not_matter(dtype, most):
    model = new_model()
    outputs = [read(model, TOKENS, KVCache(40, dtype=dtype), size) for size in (5, 40)]
    assert largest_difference(outputs[0], model(TOKENS)) < most
    assert (
        largest_difference(*outputs) < 1e-5
    )  # read back at once: no chunk sees numbers that a later one does not


@torch.no_grad()
def test_eight_bits_keep_zeros_and_the_largest_number():
    cache = KVCache(3, dtype=torch.int8)
    new = torch.tensor([[0.0, 0.0], [127.0, -1.0], [1e-3, 0.0]])[None, None]
    keys, values = cache._extend(0, new, new)
    assert torch.allclose(keys, new) and torch.allclose(values, new)
    assert not keys.isnan().any()


@torch.no_grad()
def test_a_text_goes_on_and_clear_begins_a_new_one():
    model, cache = new_model(), KVCache(40)
    first = read(model, TOKENS[:, :30], cache, 10)
    rest = forward_chunk(model, TOKENS[:, 30:], cache, positions=model.position_embedding)
    assert largest_difference(torch.cat([first, rest], 1), model(TOKENS)) < 1e-5
    cache.clear()
    assert (cache.length, cache.nbytes) == (0, 0)
    other = TOKENS[:1].flip(1)  # and of another batch
    assert largest_difference(read(model, other, cache, 10), model(other)) < 1e-5


@torch.no_grad()
def test_half_precision():
    model = new_model().bfloat16()
    given = read(model, TOKENS, KVCache(40), 10)
    assert given.dtype == torch.bfloat16
    assert largest_difference(given.float(), model(TOKENS).float()) < 0.05
    assert read(model, TOKENS, KVCache(40, dtype=torch.int8), 10).dtype == torch.bfloat16


# --- Models of Hugging Face -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
@torch.no_grad()
def test_a_hugging_face_model_gives_the_outputs_of_the_whole(transformers, name):
    sizes = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if name == "GPT2":
        model = small_gpt2(n_embd=64, n_head=4, n_positions=64, **sizes).eval()
        heads = 4
    else:  # two heads of the keys and values for four of the queries, rotary positions
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
        model = small_llama(num_attention_heads=4, num_key_value_heads=2, **sizes).eval()
        heads = 2
    expected, cache = model(TOKENS, use_cache=False).logits, KVCache(40)
    given = read(model, TOKENS, cache, 7, positions="position_ids", use_cache=False)
    assert largest_difference(given, expected) < 1e-5
    theirs = transformers.DynamicCache()
    parts = [model(part, past_key_values=theirs).logits for part in TOKENS.split(7, 1)]
    assert largest_difference(torch.cat(parts, 1), expected) < 1e-5
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in theirs.layers)
    assert (
        stored == cache.nbytes == kv_cache_bytes(40, layers=2, heads=heads, width=16, batch_size=2)
    )
    with pytest.raises(ValueError, match="use_cache=False"):  # two caches at once
        read(model, TOKENS, KVCache(40), 7, positions="position_ids", past_key_values=theirs)
    attention_mask = torch.ones_like(TOKENS)
    attention_mask[0, :5] = 0
    with pytest.raises(ValueError, match="without a mask"):
        forward_chunk(
            model,
            TOKENS,
            KVCache(40),
            positions="position_ids",
            use_cache=False,
            attention_mask=attention_mask,
        )


# --- Bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@torch.no_grad()
def test_the_cache_holds_the_bytes_of_the_formula(dtype):
    cache = KVCache(48, dtype=dtype)
    read(new_model(), TOKENS, cache, 10)
    known = kv_cache_bytes(
        48, layers=2, heads=2, width=32, batch_size=2, dtype=dtype or torch.float32
    )
    numbers = 2 * 2 * 2 * 48 * 64
    assert cache.nbytes == known == {None: 4, torch.bfloat16: 2, torch.int8: 1.125}[dtype] * numbers


def test_the_peak_is_the_weights_the_cache_and_one_chunk():
    config = gpt.tiny(layers=3, context_length=1024, hidden=64, heads=2)
    tokens = torch.randint(256, (1, 1024), generator=torch.Generator().manual_seed(0))

    def peak(chunk_size):
        def build():
            model, text = new_model(config=config).requires_grad_(False), tokens.clone()

            @torch.no_grad()
            def step():
                cache = KVCache(1024)
                for logits in forward_in_chunks(
                    model, text, cache, chunk_size, positions=model.position_embedding
                ):
                    del logits

            return step

        return measure(build, steps=1, device="cpu").known_bytes

    h, beside = 64, 4 * config.parameter_count + 8 * 1024
    beside += kv_cache_bytes(1024, layers=3, heads=2, width=32)
    for chunk_size in (1024, 256, 64):
        mask = 4 * chunk_size * 1024 if chunk_size < 1024 else 0
        predicted = beside + 4 * chunk_size * 11 * h + mask
        assert abs(peak(chunk_size) / predicted - 1) < 0.01, chunk_size


def test_a_feed_forward_in_chunks_saves_what_it_computes_only_if_that_is_recomputed():
    hidden, tokens, chunk_size = 32, 1024, 128

    def activations(**options):
        def build():
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.LayerNorm(hidden), gpt.MLP(gpt.tiny(hidden=hidden)), nn.Linear(hidden, 1)
            )
            if options:
                apply_chunked_feed_forward(model, "1", chunk_size, **options)
            x = torch.randn(4, tokens // 4, hidden)

            def step():
                loss = model(x).mean()
                loss.backward()
                model.zero_grad()
                return loss

            return step

        run = measure(build, device="cpu")
        return run.timeline.bytes["activations"].max(), run.losses

    (plain, loss), (chunked, same), (recomputed, again) = (
        activations(),
        activations(recompute=False),
        activations(recompute=True),
    )
    assert loss == pytest.approx(same, rel=1e-5) and loss == pytest.approx(again, rel=1e-5)
    assert chunked >= plain
    # What stands before and after the GELU is gone, but for one chunk in backward and the random
    # states.
    gone = 4 * 8 * hidden * tokens
    assert 0.75 * gone < plain - recomputed <= gone


def test_what_needs_no_gradient_is_joined_without_a_copy():
    def build():
        x = torch.zeros(1024, 64)

        def step():
            with torch.no_grad():
                in_chunks(lambda part: part + 1, x, chunk_size=64)

        return step

    unit = 4 * 1024 * 64
    assert measure(build, steps=1, device="cpu").known_bytes <= unit + unit + unit // 16 + 1024


# --- Training -------------------------------------------------------------------------------------


def gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def whole_loss(model):
    return F.cross_entropy(model(TOKENS).flatten(0, 1), TARGETS.flatten(), reduction="sum")


@pytest.mark.parametrize("recompute", [False, True])
def test_a_text_in_chunks_has_the_gradients_of_the_whole(recompute):
    model = new_model().train()

    def part(tokens, targets, cache):
        cache = cache.copy()
        logits = forward_chunk(model, tokens, cache, positions=model.position_embedding)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), cache

    def loss():
        total, cache = 0.0, KVCache()
        for pair in zip(TOKENS.split(7, 1), TARGETS.split(7, 1), strict=True):
            one, cache = (
                checkpoint(part, *pair, cache, use_reentrant=False)
                if recompute
                else part(*pair, cache)
            )
            total = total + one
        return total

    expected = gradients(model, lambda: whole_loss(model))
    assert largest_difference(gradients(model, loss), expected) < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_feed_forward_and_loss_in_chunks_have_the_gradients_of_the_whole(recompute, chunk_size):
    model = new_model().train()
    expected = gradients(model, lambda: whole_loss(model))
    handle = apply_chunked_feed_forward(model, "mlp", chunk_size, recompute=recompute)
    assert handle.names == ["blocks.0.mlp", "blocks.1.mlp"]
    twin = copy.deepcopy(model)  # and a copy works on its own weights

    def of(features, targets):
        return F.cross_entropy(model.head(features), targets, reduction="sum")

    def loss():
        features = model.features(TOKENS).flatten(0, 1)
        options = {"chunk_size": chunk_size, "combine": "sum", "recompute": recompute}
        return in_chunks(of, features, TARGETS.flatten(), **options)

    assert largest_difference(gradients(model, loss), expected) < 1e-5
    assert largest_difference(gradients(twin, lambda: whole_loss(twin)), expected) < 1e-5
    handle.remove()
    handle.remove()
    assert largest_difference(gradients(model, lambda: whole_loss(model)), expected) == 0
    apply_chunked_feed_forward(model, "mlp", chunk_size).remove()


def test_a_vit_and_dropout():
    images = torch.randn(2, 1, 32, 32)
    torch.manual_seed(0)
    model = vit.ViT(vit.small(layers=1, hidden=32, heads=2)).eval()
    expected = model(images)
    apply_chunked_feed_forward(model, "mlp", 10)
    assert largest_difference(model(images), expected) < 1e-5
    dropping = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))).train()
    apply_chunked_feed_forward(dropping, "0", 3, recompute=True)
    dropping(torch.ones(2, 5, 4)).sum().backward()
    assert dropping[0][1].training  # the trial of two tokens left the mode as it was


def test_a_cache_and_a_changed_model_are_freed_at_once():
    model, cache = new_model(), KVCache()
    forward_chunk(model, TOKENS, cache, positions=model.position_embedding)
    handle = apply_chunked_feed_forward(model, "mlp", 8)
    ghosts = [weakref.ref(model.head), weakref.ref(cache._attentions[0][0][0])]
    del model, cache, handle
    import gc

    gc.collect()  # a module's method is bound to it
    assert [ghost() for ghost in ghosts] == [None, None]


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity must be a whole number"),
        ({"capacity": True}, "capacity must be a whole number"),
        ({"capacity": 8, "window": 0}, "window must be a whole number"),
        ({"capacity": 8, "dtype": torch.int64}, "floating-point type or torch.int8"),
        ({"window": 4}, "needs a capacity"),
        ({"dtype": torch.int8}, "needs a capacity"),
    ],
)
def test_a_wrong_cache_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVCache(**arguments)


@torch.no_grad()
def test_too_much_is_refused_before_anything_is_read():
    model, cache = new_model(), KVCache(25)
    read(model, TOKENS[:, :20], cache, 10)
    with pytest.raises(ValueError, match="room for 25 tokens, but 20 have to stay and 10 come in"):
        forward_chunk(model, TOKENS[:, 20:30], cache, positions=model.position_embedding)
    rest = forward_chunk(model, TOKENS[:, 20:25], cache, positions=model.position_embedding)
    assert largest_difference(rest, model(TOKENS[:, :25])[:, 20:]) < 1e-5
    with pytest.raises(ValueError, match="room for 12 tokens, but 7 have to stay"):
        read(model, TOKENS, KVCache(12, window=8), 10)
    long = TOKENS.repeat(1, 2)
    with pytest.raises(ValueError, match="70 tokens, but only 64 positions"):
        read(model, long, KVCache(80), 10)


@torch.no_grad()
def test_models_whose_chunks_would_not_see_each_other_are_refused():
    naive = new_model(config=gpt.tiny(attention="naive"))
    with pytest.raises(ValueError, match="ran 0 times instead of once a layer: is it written out"):
        read(naive, TOKENS, KVCache(40), 10)
    encoder = vit.ViT(vit.small(layers=1, hidden=32, heads=2)).eval()
    with pytest.raises(ValueError, match="Only causal attention"):
        forward_chunk(encoder, torch.zeros(1, 1, 32, 32), KVCache(), positions=None)

    class Once(nn.Module):  # attends in its first chunk twice, and then once
        def __init__(self):
            super().__init__()
            self.times = iter([2, 1, 3])

        def forward(self, x):
            q = x[:, None]
            for _ in range(next(self.times)):
                F.scaled_dot_product_attention(q, q, q, is_causal=True)
            return x

    model, cache = Once(), KVCache(8)
    forward_chunk(model, torch.randn(1, 4, 8), cache, positions=None)
    with pytest.raises(ValueError, match="ran 1 times instead of 2"):
        forward_chunk(model, torch.randn(1, 4, 8), cache, positions=None)
    cache = KVCache(8)
    cache._attentions, cache.length = [((), ())] * 2, 4
    with pytest.raises(ValueError, match="attends more often"):
        cache._extend(2, torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))

    def cross(x):
        q = x[:, None]
        return F.scaled_dot_product_attention(q[:, :, :2], q, q, is_causal=True)

    with pytest.raises(ValueError, match="of the chunk's 4 tokens"):
        forward_chunk(cross, torch.randn(1, 4, 8), KVCache(8), positions=None)


@torch.no_grad()
def test_positions_that_are_none_are_refused():
    model = new_model()
    with pytest.raises(ValueError, match="got other numbers"):
        read(model, TOKENS, KVCache(40), 10, positions=model.token_embedding)
    with pytest.raises(ValueError, match="does not use the embedding"):
        read(model, TOKENS, KVCache(40), 10, positions=nn.Embedding(64, 64))
    with pytest.raises(TypeError, match="an nn.Embedding, a name or None"):
        read(model, TOKENS, KVCache(40), 10, positions=7)
    with pytest.raises(
        TypeError, match="positions"
    ):  # no default: forgetting it would give wrong numbers
        forward_chunk(model, TOKENS, KVCache(40))


@torch.no_grad()
def test_a_cache_that_an_error_left_incomplete_is_not_used():
    model, cache = new_model(), KVCache(40)
    forward_chunk(model, TOKENS[:, :10], cache, positions=model.position_embedding)

    def broken(module, args):
        raise KeyError("broken")

    handle = model.blocks[1].register_forward_pre_hook(broken)
    with pytest.raises(KeyError):  # the model's own error, as it is
        forward_chunk(model, TOKENS[:, 10:20], cache, positions=model.position_embedding)
    handle.remove()
    with pytest.raises(RuntimeError, match="clear\\(\\) the cache"):
        forward_chunk(model, TOKENS[:, 10:20], cache, positions=model.position_embedding)
    cache.clear()
    assert largest_difference(read(model, TOKENS, cache, 10), model(TOKENS)) < 1e-5


def test_autograd_and_other_batches_are_refused():
    model = new_model()
    with pytest.raises(RuntimeError, match="use no_grad"):
        read(model, TOKENS, KVCache(40), 10)
    with pytest.raises(ValueError, match="written in place"):
        KVCache(40).copy()
    cache = KVCache(40)
    with torch.no_grad():
        forward_chunk(model, TOKENS[:, :10], cache, positions=model.position_embedding)
        with pytest.raises(ValueError, match="clear\\(\\) it for another batch"):
            forward_chunk(model, TOKENS[:1, 10:], cache, positions=model.position_embedding)


@pytest.mark.parametrize("tokens", [TOKENS[0], TOKENS[:, :0], [1, 2]])
def test_wrong_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match="tokens must be \\(batch, chunk"):
        forward_chunk(new_model(), tokens, KVCache(40), positions=None)


def test_wrong_chunks_are_refused():
    x = torch.ones(4, 2)
    for size in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="chunk_size must be a whole number"):
            in_chunks(lambda part: part, x, chunk_size=size)
        with pytest.raises(ValueError, match="chunk_size must be a whole number"):
            forward_in_chunks(new_model(), TOKENS, KVCache(40), size, positions=None)
    with pytest.raises(ValueError, match="one number of tokens"):
        in_chunks(lambda a, b: a, x, x[:3], chunk_size=2)
    with pytest.raises(ValueError, match="one number of tokens"):
        in_chunks(lambda part: part, x[:0], chunk_size=2)
    with pytest.raises(ValueError, match="one number of tokens"):
        in_chunks(lambda: x, chunk_size=2)
    with pytest.raises(ValueError, match='"cat" or "sum"'):
        in_chunks(lambda part: part, x, chunk_size=2, combine="mean")
    for function in (lambda part: part.sum(), lambda part: part[:1]):
        with pytest.raises(ValueError, match="2 tokens gave a result of shape"):
            in_chunks(function, x, chunk_size=2)


def test_modules_that_mix_tokens_are_refused():
    class Mixer(nn.Module):
        def forward(self, x):
            return x + x.mean(0, keepdim=True)

    model = nn.Sequential(Mixer())
    apply_chunked_feed_forward(model, "0", 3)
    with pytest.raises(ValueError, match="Mixer mixes tokens"):
        model(torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match="holds a batch norm"):
        apply_chunked_feed_forward(nn.Sequential(nn.Sequential(nn.BatchNorm1d(4))), "0", 3)
    with pytest.raises(ValueError, match="No module of this GPT is called 'ffn'"):
        apply_chunked_feed_forward(new_model(), "ffn", 3)
    twice = new_model()
    apply_chunked_feed_forward(twice, "mlp", 3)
    with pytest.raises(ValueError, match="in chunks already: remove"):
        apply_chunked_feed_forward(twice, "mlp", 3)


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_outputs_and_bytes_are_the_same():
    model, tokens = new_model().cuda(), TOKENS.cuda()
    expected = model(tokens)
    for chunk_size in (1, 7, 40):
        cache = KVCache(40)
        assert largest_difference(read(model, tokens, cache, chunk_size), expected) < 1e-4
        assert cache.nbytes == kv_cache_bytes(40, layers=2, heads=2, width=32, batch_size=2)
    given = read(model, tokens, KVCache(40, dtype=torch.int8), 7)
    assert largest_difference(given, expected) < 0.02
    given = read(model, tokens, KVCache(7 + 6, window=8), 6)
    assert largest_difference(given.cpu(), windowed(model.cpu(), TOKENS, 8)) < 1e-4


@pytest.mark.gpu
def test_on_a_gpu_a_text_in_chunks_has_the_gradients_of_the_whole():
    model, tokens, targets = new_model().cuda(), TOKENS.cuda(), TARGETS.cuda()

    def loss(chunk_size):
        cache, total = KVCache(), 0.0
        for part, answers in zip(
            tokens.split(chunk_size, 1), targets.split(chunk_size, 1), strict=True
        ):
            logits = forward_chunk(model, part, cache, positions=model.position_embedding)
            total = total + F.cross_entropy(
                logits.flatten(0, 1), answers.flatten(), reduction="sum"
            )
        return total

    expected = gradients(model, lambda: loss(40))
    assert largest_difference(gradients(model, lambda: loss(8)), expected) < 1e-4
