"""Sparse attention: the window in pieces is the window by a mask, forward and backward, and keeps
nothing of the size sequence x sequence."""

import functools
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlab import measure
from memlab.techniques.sparse_attention import (
    apply_attention,
    hugging_face_attention,
    sliding_window_attention,
    window_mask,
)
from memlab.workloads import gpt, vit


def by_a_mask(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=True, scale=None, *, window, after=0
):
    """The reference: all scores, by hand, and what is outside of the window left out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    seen = window_mask(query.shape[2], key.shape[2], window, after=after, device=query.device)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


def tensors(
    queries, keys, heads=4, key_heads=4, width=8, value_width=8, dtype=torch.float64, device="cpu"
):
    shapes = (heads, queries, width), (key_heads, keys, width), (key_heads, keys, value_width)
    return [
        torch.randn(2, *shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes
    ]


def difference(one, other):
    """The largest difference between two lists of tensors, relative to the largest
    value of each.
    """
    pairs = list(zip(one, other, strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def with_gradients(attention, inputs, **options):
    output = attention(*inputs, **options)
    torch.manual_seed(1)
    weights = torch.randn(
        output.shape, dtype=torch.float64
    )  # the same numbers in any layout and type
    return [output.detach(), *torch.autograd.grad(output, inputs, weights.to(output))]


# --- The function ---------------------------------------------------------------------------------


def test_the_mask_is_the_definition():
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(window_mask(4, 4, 2), expected)
    assert torch.equal(window_mask(2, 4, 2), expected[2:])  # the queries are the last positions
    assert torch.equal(window_mask(4, 4, 2, after=1), expected | expected.T)
    assert torch.equal(window_mask(4, 4, 9), torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize(
    ("queries", "keys", "window", "after", "piece", "key_heads"),
    [
        (48, 48, 16, 0, None, 4),
        (50, 50, 7, 0, None, 4),  # the last piece is shorter
        (50, 50, 16, 0, 5, 4),
        (50, 50, 5, 0, 16, 2),
        (50, 50, 1, 0, None, 4),
        (50, 50, 50, 0, None, 4),
        (50, 50, 5000, 0, 11, 1),  # the window is longer than the sequence
        (50, 50, 7, 3, None, 4),
        (50, 50, 3, 20, 8, 2),
        (50, 50, 9, 5000, 13, 4),
        (13, 50, 7, 0, None, 4),  # keys from a cache
        (13, 50, 30, 2, 4, 2),
        (1, 50, 7, 0, None, 1),
        (1, 1, 1, 0, None, 4),
    ],
)
def test_output_and_gradients_are_those_of_the_masked_reference(
    queries, keys, window, after, piece, key_heads
):
    inputs = tensors(queries, keys, key_heads=key_heads)
    expected = with_gradients(by_a_mask, inputs, window=window, after=after)
    options = {
        "is_causal": after == 0,
        "enable_gqa": key_heads < 4,
        "window": window,
        "after": after,
        "piece": piece,
    }
    given = with_gradients(sliding_window_attention, inputs, **options)
    # Where each key is seen by one query with weight 1, the true gradient of query and key is zero.
    if window == 1 or keys == 1:
        assert max(gradient.abs().max() for gradient in (*given[1:3], *expected[1:3])) < 1e-12
        given, expected = (given[0], given[3]), (expected[0], expected[3])
    assert difference(given, expected) < 1e-12


def test_scale_and_a_value_of_another_width_are_kept():
    inputs = tensors(20, 20, value_width=5)
    expected = with_gradients(by_a_mask, inputs, window=4, scale=0.3)
    assert (
        difference(with_gradients(sliding_window_attention, inputs, window=4, scale=0.3), expected)
        < 1e-12
    )


def test_the_causal_window_of_the_whole_sequence_is_full_attention():
    inputs = tensors(40, 40, dtype=torch.float32)
    full = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    ours = functools.partial(sliding_window_attention, window=40, piece=16)
    assert difference(with_gradients(ours, inputs), with_gradients(full, inputs)) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_other_types(dtype, tolerance):
    inputs = tensors(50, 50, dtype=dtype)
    expected = with_gradients(
        by_a_mask, [t.detach().double().requires_grad_() for t in inputs], window=8
    )
    given = with_gradients(sliding_window_attention, inputs, window=8)
    assert difference([t.double() for t in given], expected) < tolerance


def test_under_autocast_it_runs_in_the_lower_type_also_in_backward():
    inputs = tensors(30, 30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = sliding_window_attention(*inputs, window=8)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.float().sum(), inputs)
    assert all(
        gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients
    )


def test_only_some_inputs_learn_or_none():
    query, key, value = tensors(20, 20)
    (expected,) = torch.autograd.grad(by_a_mask(query, key, value, window=4).sum(), value)
    output = sliding_window_attention(query.detach(), key.detach(), value, window=4)
    output.sum().backward()
    torch.testing.assert_close(value.grad, expected)
    with torch.no_grad():
        assert not sliding_window_attention(query, key, value, window=4).requires_grad


def test_the_gradient_is_that_of_finite_differences_and_there_is_no_second():
    inputs = tensors(7, 7, heads=1, key_heads=1, width=2, value_width=2)
    attention = functools.partial(sliding_window_attention, window=3, piece=2)
    assert torch.autograd.gradcheck(attention, inputs)
    (first,) = torch.autograd.grad(attention(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_one_more_token_with_the_last_keys_is_the_last_row():
    query, key, value = (tensor.detach() for tensor in tensors(30, 30))
    whole = sliding_window_attention(query, key, value, window=8)
    for t in (0, 3, 20, 29):
        seen = slice(max(0, t - 7), t + 1)
        one = sliding_window_attention(
            query[:, :, t : t + 1], key[:, :, seen], value[:, :, seen], window=8
        )
        torch.testing.assert_close(one, whole[:, :, t : t + 1])


# --- Bytes ----------------------------------------------------------------------------------------

HEADS, WIDTH, LENGTH, WINDOW = 2, 16, 512, 32


def saved_bytes(attention):
    """What autograd holds beside query, key, value and the output, counted by storage."""
    inputs = tensors(LENGTH, LENGTH, HEADS, HEADS, WIDTH, WIDTH, torch.float32)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = attention(*inputs)
    for known in (*inputs, output):
        storages.pop(known.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def test_what_is_saved_is_query_key_and_value_and_nothing_else():
    mask = window_mask(LENGTH, LENGTH, WINDOW)
    masked = functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
    denominators = 4 * 2 * HEADS * LENGTH
    full = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    assert saved_bytes(full) == denominators
    assert saved_bytes(masked) == denominators + 4 * LENGTH**2  # the mask, as numbers
    assert saved_bytes(functools.partial(sliding_window_attention, window=WINDOW)) == 0


def test_the_ledger_of_a_gpt_is_full_fused_attention_s_and_a_mask_s_is_higher_by_the_masks():
    config = gpt.tiny(layers=3, context_length=LENGTH)

    def run(attention):
        def build():
            torch.manual_seed(0)
            model = gpt.GPT(config)
            tokens = torch.randint(256, (1, LENGTH))
            for block in model.blocks:
                apply_attention(block.attention, attention)

            def step():
                model.zero_grad()
                loss = model(tokens, tokens)
                loss.backward()
                return loss

            return step

        return measure(build, device="cpu")

    seen = window_mask(LENGTH, LENGTH, WINDOW)

    def masked(query, key, value, dropout_p, is_causal):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)

    full, by_mask, ours = map(
        run,
        (
            F.scaled_dot_product_attention,
            masked,
            functools.partial(sliding_window_attention, window=WINDOW),
        ),
    )
    assert full.columns["activations"] == gpt.activation_bytes(config, 1, LENGTH)
    for column in ("peak", "activations"):
        of_full, of_mask, of_ours = (
            run.known_bytes if column == "peak" else run.columns[column]
            for run in (full, by_mask, ours)
        )
        assert of_full - of_ours == 3 * 4 * config.heads * LENGTH, (
            column
        )  # the softmax's denominators
        assert of_mask - of_full == 3 * 4 * LENGTH**2, column  # a mask in each layer
    assert ours.losses == pytest.approx(by_mask.losses, rel=1e-5)


def test_nothing_grows_with_the_square_of_the_length():
    def peak(length):
        def build():
            inputs = tensors(length, length, 1, 1, 4, 4, torch.float32)
            return lambda: sliding_window_attention(*inputs, window=16).sum().backward()

        return measure(build, device="cpu").known_bytes

    small, large, larger = peak(500), peak(1000), peak(2000)
    assert abs((larger - large) - 2 * (large - small)) < 0.02 * larger


# --- Applied from outside -------------------------------------------------------------------------

ATTENTION = functools.partial(sliding_window_attention, window=7)
REFERENCE = functools.partial(by_a_mask, window=7)


def trained(model, *batch):
    model.zero_grad()
    loss = model(*batch)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def gpt_and_batch(layers=2, **changes):
    torch.manual_seed(0)
    model = gpt.GPT(gpt.tiny(layers=layers, **changes))
    return model, (torch.randint(256, (2, 40)), torch.randint(256, (2, 40)))


def test_a_gpt_with_a_window_is_the_masked_gpt():
    model, batch = gpt_and_batch()
    full = trained(model, *batch)
    found = {}
    for attention in (REFERENCE, ATTENTION):
        handles = [apply_attention(block.attention, attention) for block in model.blocks]
        found[attention] = trained(model, *batch)
        for handle in handles:
            handle.remove()
            handle.remove()
    # The gradient of the keys' bias is zero but for rounding, so it is compared with the largest of
    # all.
    largest = max(gradient.abs().max() for gradient in found[REFERENCE][1:])
    gaps = [(a - b).abs().max() for a, b in zip(found[ATTENTION], found[REFERENCE], strict=True)]
    assert max(gaps) < 1e-5 * largest
    assert (
        abs(found[ATTENTION][0] - full[0]) > 1e-5
    )  # a window is another model than full attention
    assert all(
        map(torch.equal, trained(model, *batch), full)
    )  # removed, it is the model that it was


def test_some_layers_may_keep_full_attention():
    model, batch = gpt_and_batch()
    apply_attention(model.blocks[0].attention, ATTENTION)
    one = trained(model, *batch)[0]
    apply_attention(model.blocks[1].attention, ATTENTION)
    assert one != trained(model, *batch)[0]


def test_a_vit_with_a_window_to_both_sides_is_the_masked_vit():
    torch.manual_seed(0)
    model = vit.ViT(vit.small(layers=2, hidden=32, heads=2))
    batch = torch.randn(2, 1, 32, 32), torch.tensor([1, 2])
    found = []
    for attention in (
        functools.partial(by_a_mask, window=9, after=8),
        functools.partial(sliding_window_attention, window=9, after=8, is_causal=False),
    ):
        handles = [apply_attention(block.attention, attention) for block in model.blocks]
        found.append(trained(model, *batch))
        for handle in handles:
            handle.remove()
    largest = max(gradient.abs().max() for gradient in found[0][1:])
    assert max((a - b).abs().max() for a, b in zip(*found, strict=True)) < 1e-5 * largest


def test_under_checkpointing_the_second_run_has_the_window_too():
    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    model, batch = gpt_and_batch()
    for block in model.blocks:
        apply_attention(block.attention, ATTENTION)
    expected = trained(model, *batch)
    model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    assert all(map(torch.equal, trained(model, *batch), expected))


def test_what_cannot_be_replaced_is_refused():
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        apply_attention(F.relu, ATTENTION)
    model, batch = gpt_and_batch()
    attention = model.blocks[0].attention
    with pytest.raises(TypeError, match="must be a function"):
        apply_attention(attention, 128)
    apply_attention(attention, ATTENTION)
    with pytest.raises(ValueError, match="another attention already: remove"):
        apply_attention(attention, ATTENTION)
    naive, batch = gpt_and_batch(attention="naive")
    apply_attention(naive.blocks[0].attention, ATTENTION)
    with pytest.raises(RuntimeError, match="did not call scaled_dot_product_attention"):
        naive(*batch)
    dropping, batch = gpt_and_batch(dropout=0.1)
    apply_attention(dropping.blocks[0].attention, ATTENTION)
    with pytest.raises(ValueError, match="has no dropout"):
        dropping(*batch)
    not_causal = vit.ViT(vit.small(layers=1, hidden=32, heads=2))
    apply_attention(not_causal.blocks[0].attention, functools.partial(ATTENTION, is_causal=False))
    with pytest.raises(ValueError, match="is_causal=False and after=0 contradict"):
        not_causal(torch.randn(1, 1, 32, 32))


def test_an_error_inside_leaves_nothing_replaced():
    model, batch = gpt_and_batch()
    attention = model.blocks[0].attention
    apply_attention(attention, ATTENTION)
    with pytest.raises(ValueError, match="not enough values"):
        attention(torch.randn(3, 64))
    query, key, value = tensors(20, 20)
    mask = torch.zeros(20, 20, dtype=torch.float64)
    torch.testing.assert_close(  # a mask: with ours in place that would be an error
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask),
        F.scaled_dot_product_attention(query, key, value),
    )


def test_a_deleted_model_is_freed_at_once():
    model, batch = gpt_and_batch()
    handle = apply_attention(model.blocks[0].attention, ATTENTION)
    trained(model, *batch)
    ghost = weakref.ref(model.blocks[0].attention)
    del model
    assert ghost() is None
    handle.remove()


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be a whole number of at least 1, but it is 0"),
        ({"window": 2.0}, ValueError, "window must be a whole number"),
        ({"window": True}, ValueError, "window must be a whole number"),
        (
            {"after": -1, "is_causal": False},
            ValueError,
            "after must be a whole number of at least 0",
        ),
        ({"piece": 0}, ValueError, "piece must be a whole number of at least 1"),
        ({"after": 2}, ValueError, "is_causal=True and after=2 contradict"),
        ({"attn_mask": torch.ones(20, 20).bool()}, ValueError, "attn_mask must be None"),
        ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0, not 0.1"),
        ({"query": None}, TypeError, "query must be a floating-point tensor, but it is None"),
        (
            {"key": torch.ones(2, 4, 20, 8).long()},
            TypeError,
            "key must be a floating-point tensor, but it is torch.int64",
        ),
        ({"query": torch.randn(4, 20, 8)}, ValueError, r"query \(4, 20, 8\)"),
        ({"query": torch.randn(2, 4, 20, 7)}, ValueError, r"query \(2, 4, 20, 7\)"),
        ({"query": torch.randn(2, 8, 20, 8)}, ValueError, "only under enable_gqa"),
        (
            {"query": torch.randn(2, 6, 20, 8), "enable_gqa": True},
            ValueError,
            r"query \(2, 6, 20, 8\)",
        ),
        ({"value": torch.randn(2, 4, 19, 8)}, ValueError, r"value \(2, 4, 19, 8\)"),
        ({"query": torch.randn(2, 4, 21, 8)}, ValueError, "21 queries and 20 keys"),
        ({"query": torch.randn(2, 4, 0, 8)}, ValueError, r"query \(2, 4, 0, 8\)"),
        (
            {"query": torch.randn(2, 4, 20, 8).double()},
            ValueError,
            "query torch.float64 on cpu, key torch.float32",
        ),
    ],
)
def test_bad_input_is_refused(changes, error, message):
    given = (
        {name: torch.randn(2, 4, 20, 8) for name in ("query", "key", "value")}
        | {"window": 4}
        | changes
    )
    with pytest.raises(error, match=message):
        sliding_window_attention(**given)


def test_a_mask_for_more_queries_than_keys_is_refused():
    with pytest.raises(ValueError, match="5 queries and 4 keys"):
        window_mask(5, 4, 2)


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral():
    transformers = pytest.importorskip("transformers")
    from transformers.masking_utils import flash_attention_mask

    transformers.AttentionInterface.register("window", hugging_face_attention)
    transformers.AttentionMaskInterface.register("window", flash_attention_mask)
    config = transformers.MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    yield transformers.MistralForCausalLM(config).double()


def test_mistral_s_own_window_is_ours(mistral):
    tokens = torch.randint(64, (2, 100))

    def run(implementation):
        mistral.set_attn_implementation(implementation)
        mistral.zero_grad()
        output = mistral(input_ids=tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        return [output.logits.detach(), *(parameter.grad for parameter in mistral.parameters())]

    assert difference(run("window"), run("sdpa")) < 1e-10


@torch.no_grad()
def test_mistral_s_cache_works_with_ours(mistral):
    tokens = torch.randint(64, (1, 50))
    logits = {}
    for implementation in ("sdpa", "window"):
        mistral.set_attn_implementation(implementation)
        cache, parts = None, []
        for part in tokens.split([30, 3, *[1] * 17], dim=1):
            output = mistral(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        logits[implementation] = torch.cat(parts, dim=1)
    whole = mistral(input_ids=tokens, use_cache=False).logits
    assert difference([logits["window"]], [logits["sdpa"]]) < 1e-10
    assert difference([logits["window"]], [whole]) < 1e-10


def test_a_layer_without_a_window_sees_all_that_comes_before(mistral):
    layer = mistral.model.layers[0].self_attn
    query, key, value = tensors(20, 20, key_heads=2)
    output, _ = hugging_face_attention(layer, query, key, value, None)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_padding_and_what_else_a_window_cannot_do_is_refused(mistral):
    mistral.set_attn_implementation("window")
    tokens = torch.randint(64, (2, 20))
    mistral(input_ids=tokens, attention_mask=torch.ones(2, 20).long())
    padded = torch.ones(2, 20).long()
    padded[0, :3] = 0
    with pytest.raises(ValueError, match="attn_mask must be None"):
        mistral(input_ids=tokens, attention_mask=padded)
    packed = torch.arange(10).repeat(2).expand(2, -1)
    with pytest.raises(ValueError, match="no packed sequences"):
        mistral(input_ids=tokens, position_ids=packed)
    layer, inputs = mistral.model.layers[0].self_attn, tensors(20, 20, key_heads=2)
    with pytest.raises(ValueError, match="has no softcap, and MistralAttention needs it"):
        hugging_face_attention(layer, *inputs, None, softcap=30.0)
    with pytest.raises(
        ValueError, match="hugging_face_attention is causal, and MistralAttention is not"
    ):
        hugging_face_attention(layer, *inputs, None, is_causal=False)
    transformers = pytest.importorskip("transformers")
    static = transformers.StaticCache(config=mistral.config, max_cache_len=64)
    with torch.no_grad(), pytest.raises(ValueError, match="A static cache"):
        mistral(input_ids=tokens[:, :5], past_key_values=static, use_cache=True)


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("window", "after", "piece"), [(64, 0, None), (65, 0, 48), (100, 30, 33), (128, 0, 113)]
)
def test_on_a_gpu_it_is_the_masked_reference(window, after, piece):
    inputs = tensors(500, 500, width=64, value_width=64, dtype=torch.float32, device="cuda")
    expected = with_gradients(by_a_mask, inputs, window=window, after=after)
    options = {"window": window, "after": after, "piece": piece, "is_causal": after == 0}
    assert difference(with_gradients(sliding_window_attention, inputs, **options), expected) < 1e-4


@pytest.mark.gpu
def test_on_a_gpu_nothing_of_sequence_by_sequence_is_there():
    length, window = 8192, 128
    inputs = tensors(length, length, 1, 1, 64, 64, torch.float32, "cuda")
    sliding_window_attention(
        *inputs, window=window
    ).sum().backward()  # work spaces come with the first call
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sliding_window_attention(*inputs, window=window).sum().backward()
    assert (
        torch.cuda.max_memory_allocated() - before < length**2
    )  # a mask of one byte a pair would be that
