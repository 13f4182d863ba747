"""The loss in tiles of words, the tied embedding's one gradient, and everything together on our GPT
and on a model of Hugging Face.
"""

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memlab import measure
from memlab.techniques.compilation_and_fusion import apply_fused_loss
from memlab.techniques.gradient_accumulation import (
    apply_layer_major_micro_batches,
    in_micro_batches,
    optimizer_in_backward,
)
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing
from memlab.techniques.large_vocabulary import apply_tied_embedding, tiled_linear_cross_entropy
from memlab.techniques.lean_optimizers import AdamW8bit
from memlab.techniques.lean_start import materialize
from memlab.techniques.low_precision import stochastic_round
from memlab.techniques.mixed_precision import apply_mixed_precision
from memlab.techniques.offloading import far_like, far_zeros, offload_activations, stream_parameters
from memlab.workloads import gpt
from tests.helpers import (
    is_far,
    largest_difference,
    numbers_of,
    run_gpt,
    run_hugging_face,
    small_gpt,
    small_gpt2,
    small_llama,
    training_step,
)

TOKENS, HIDDEN, WORDS = 37, 16, 101  # no multiple of a tile of 20: the last tile is one word


def loss_and_gradients(model, run):
    model.zero_grad()
    loss = run(model)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


# --- The loss, a tile of words at a time: the same numbers ----------------------------------------


def problem(dtype=torch.float32, ignored=0, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (tokens, WORDS)
    )
    targets = torch.randint(WORDS, (tokens,), generator=generator)
    targets[:ignored] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets, **options):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, **options
    )


def both(function, hidden, weight, targets, factor=1.0, **options):
    """The loss, and the gradients of the leaves that get one."""
    for leaf in (hidden, weight):
        leaf.grad = None
    loss = function(hidden, weight, targets, **options)
    (factor * loss).backward()
    return loss.detach(), [leaf.grad for leaf in (hidden, weight) if leaf.requires_grad]


TILES = pytest.mark.parametrize("tile_words", [1, 20, WORDS, 1000])


@TILES
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 4e-6)])
def test_loss_and_gradients_are_those_of_the_plain_loss(tile_words, reduction, dtype, limit):
    given = problem(dtype, ignored=6)
    expected, wanted = both(plain, *given, factor=3.0, reduction=reduction)
    options = {"reduction": reduction, "tile_words": tile_words}
    loss, gradients = both(tiled_linear_cross_entropy, *given, factor=3.0, **options)
    assert loss.dtype == dtype and loss.shape == ()
    assert largest_difference([loss], [expected]) < limit
    assert largest_difference(gradients, wanted) < limit
    assert not gradients[0][:6].any()  # the ignored tokens


def test_the_default_tile_and_many_tokens():
    given = problem(
        torch.float64, tokens=1500
    )  # more than the 1,024 whose products are added at once
    expected, wanted = both(plain, *given)
    loss, gradients = both(tiled_linear_cross_entropy, *given)
    assert largest_difference([loss, *gradients], [expected, *wanted]) < 1e-12


@TILES
@pytest.mark.parametrize("how", ["autocast", "16-bit weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_in_16_bits_it_is_at_most_twice_as_far_from_the_exact_gradients_as_the_plain_loss(
    tile_words, how, dtype
):
    low = problem(torch.float32 if how == "autocast" else dtype)
    # The exact gradients of the very same numbers, so that only the computation counts.
    exact = [leaf.detach().double().requires_grad_() for leaf in low[:2]]
    reference, wanted = both(plain, *exact, low[2])
    losses, errors = {}, {}
    for function in (plain, functools.partial(tiled_linear_cross_entropy, tile_words=tile_words)):
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            loss = function(*low)
        assert loss.dtype == torch.float32
        for leaf in low[:2]:
            leaf.grad = None
        (1024 * loss).backward()  # as a loss scaler does it
        assert [leaf.grad.dtype for leaf in low[:2]] == [leaf.dtype for leaf in low[:2]]
        losses[function is plain] = abs(loss.double() - reference).item()
        errors[function is plain] = [
            largest_difference([leaf.grad / 1024], [one])
            for leaf, one in zip(low, wanted, strict=False)
        ]
    assert losses[False] <= 2 * losses[True] + 1e-6
    assert all(
        0 < ours <= 2 * theirs < 0.1
        for ours, theirs in zip(errors[False], errors[True], strict=True)
    )


def test_fp16_is_refused_since_its_sums_can_overflow():
    with pytest.raises(TypeError, match="In FP16 the sum over all tokens can pass the largest"):
        tiled_linear_cross_entropy(*problem(torch.float16))
    with torch.autocast("cpu", torch.float16), pytest.raises(TypeError, match="In FP16"):
        tiled_linear_cross_entropy(*problem(torch.float32))


def test_the_gradient_of_hidden_states_in_16_bits_is_summed_in_fp32():
    """256 tiles that each add 1 to what is 256 already: a BF16 sum would stay at 256."""
    hidden = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.full((512, 1), 512.0, dtype=torch.bfloat16)
    weight[0] = 0
    loss = tiled_linear_cross_entropy(
        hidden, weight, torch.zeros(1, dtype=torch.int64), tile_words=1
    )
    loss.backward()
    assert (
        hidden.grad.item() == 512
    )  # 511 words of probability 1/512 and weight 512: 511, rounded to BF16


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", ["all ignored", "no tokens", "large logits", "a word ignored"])
def test_in_odd_cases_it_does_what_cross_entropy_does(case, reduction):
    ignored = TOKENS if case == "all ignored" else 0
    hidden, weight, targets = problem(torch.float64, ignored, 0 if case == "no tokens" else TOKENS)
    options = {"reduction": reduction}
    if case == "large logits":  # they overflow exp
        with torch.no_grad():
            weight *= 1000
    if case == "a word ignored":
        targets[3] = targets[8] = options["ignore_index"] = 7
    expected, wanted = both(plain, hidden, weight, targets, **options)
    loss, gradients = both(
        tiled_linear_cross_entropy, hidden, weight, targets, tile_words=20, **options
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0, equal_nan=True)
    assert loss.isnan() == (reduction == "mean" and case in ("all ignored", "no tokens"))
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-12 * max(1, loss.nan_to_num()))


def test_a_weight_that_is_not_contiguous():
    hidden, weight, targets = problem(torch.float64)
    turned = weight.detach().T.contiguous().T.requires_grad_()
    expected, wanted = both(plain, hidden, weight, targets)
    loss, gradients = both(tiled_linear_cross_entropy, hidden, turned, targets, tile_words=20)
    assert largest_difference([loss, *gradients], [expected, *wanted]) < 1e-12


# --- What is not needed is not computed, and nothing is kept or copied ----------------------------


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient_and_the_other_one_the_right_one(frozen):
    given = problem(torch.float64)
    _, wanted = both(plain, *given)
    given[frozen].requires_grad_(False)
    made = []

    def gradient_like(weight):
        made.append(torch.empty_like(weight))
        return made[-1]

    _, gradients = both(
        tiled_linear_cross_entropy, *given, tile_words=20, gradient_like=gradient_like
    )
    assert given[frozen].grad is None and len(made) == 1 - frozen
    assert largest_difference(gradients, [wanted[1 - frozen]]) < 1e-12


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_without_grad_no_gradient_is_made_and_nothing_is_kept(how):
    given = problem()
    expected = plain(*given).detach()
    if how == "frozen":
        for leaf in given[:2]:
            leaf.requires_grad_(False)
    refuse = lambda weight: pytest.fail("asked for a gradient")  # noqa: E731
    with torch.no_grad() if how == "no_grad" else contextlib.nullcontext():
        loss = tiled_linear_cross_entropy(*given, tile_words=20, gradient_like=refuse)
    assert not loss.requires_grad and loss.grad_fn is None
    torch.testing.assert_close(loss, expected)


def test_the_inputs_are_not_kept():
    hidden, weight, targets = problem()
    product = hidden * 2  # not a leaf: nobody else holds it
    gone = weakref.ref(product)
    loss = tiled_linear_cross_entropy(product, weight, targets)
    del product
    assert gone() is None
    loss.backward()


def test_the_gradient_is_made_by_gradient_like_and_given_away_not_copied(tmp_path):
    hidden, weight, targets = problem()
    made = []

    def gradient_like(given):
        assert given.data_ptr() == weight.data_ptr()
        made.append(far_like(given, tmp_path))
        return made[-1]

    loss = tiled_linear_cross_entropy(hidden, weight, targets, gradient_like=gradient_like)
    pointer = made.pop().data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == pointer and is_far(weight.grad) and not is_far(hidden.grad)
    _, wanted = both(plain, hidden, weight, targets)
    again, gradients = both(tiled_linear_cross_entropy, hidden, weight, targets)
    assert largest_difference(gradients, wanted) < 4e-6


# --- The bytes ------------------------------------------------------------------------------------

SIZES = {"tokens": 256, "hidden": 32, "words": 8192}


def build_loss(function, tokens, hidden, words, dtype=torch.float32, learns=True, **options):
    def build():
        inputs = torch.randn(tokens, hidden, dtype=dtype, requires_grad=learns)
        weight = torch.randn(words, hidden, dtype=dtype, requires_grad=learns)
        targets = torch.randint(words, (tokens,))

        def step():
            loss = function(inputs, weight, targets, **options)
            if learns:
                loss.backward()
                inputs.grad = weight.grad = None
            return loss.detach()

        return step

    return build


@pytest.mark.parametrize("tile_words", [64, 1000, 8192])
def test_the_peak_is_one_tile_of_logits_and_its_product(tile_words):
    tokens, hidden, words = SIZES.values()
    peak = measure(
        build_loss(tiled_linear_cross_entropy, **SIZES, tile_words=tile_words), device="cpu"
    ).known_bytes
    inputs = 4 * tokens * hidden + 4 * words * hidden + 8 * tokens
    gradients = 4 * tokens * hidden + 4 * words * hidden
    tile = (
        4 * tokens * tile_words + 4 * max(tile_words, tokens) * hidden
    )  # the logits, and a product with them
    # For each token: whether it counts and whether the tile has its word (1 byte each), which word
    # and which of the tile's (8 each), the largest logit, the denominator and the target's logit (4
    # each). The loss and the count.
    small = 30 * tokens + 12
    assert peak == inputs + gradients + tile + small
    # The plain loss holds three tensors of the size of all logits.
    if tile_words == 64:
        whole = measure(build_loss(plain, **SIZES), device="cpu").known_bytes
        assert inputs + 3 * 4 * tokens * words <= whole <= inputs + 3 * 4 * tokens * words + 64


def test_in_16_bits_logits_are_there_in_16_and_in_32_and_the_weights_gradient_has_16():
    tokens, hidden, words = SIZES.values()
    build = build_loss(tiled_linear_cross_entropy, **SIZES, dtype=torch.bfloat16, tile_words=512)
    peak = measure(build, device="cpu").known_bytes
    inputs = 2 * tokens * hidden + 2 * words * hidden + 8 * tokens
    gradients = (
        4 * tokens * hidden + 2 * words * hidden
    )  # that of the hidden states is a sum in FP32
    assert peak == inputs + gradients + 6 * tokens * 512 + 31 * tokens + 12


def test_without_grad_one_tile_is_all():
    tokens, hidden, words = SIZES.values()
    build = build_loss(tiled_linear_cross_entropy, **SIZES, learns=False, tile_words=64)
    peak = measure(build, device="cpu").known_bytes
    inputs, logits = 4 * tokens * hidden + 4 * words * hidden + 8 * tokens, 4 * tokens * 64
    assert inputs + logits <= peak <= inputs + logits + 48 * tokens


# --- What the loss cannot do is refused -----------------------------------------------------------


def test_a_second_backward_is_refused():
    given = problem()
    loss = tiled_linear_cross_entropy(*given)
    loss.backward(retain_graph=True)
    first = given[1].grad.clone()
    with pytest.raises(RuntimeError, match="first backward pass used the gradients up: compute"):
        loss.backward()
    assert torch.equal(given[1].grad, first)


def test_a_second_derivative_is_refused():
    given = problem()
    with pytest.raises(RuntimeError, match="tiled_linear_cross_entropy has no second derivative"):
        torch.autograd.grad(tiled_linear_cross_entropy(*given), given[1], create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(2, 3, HIDDEN)}, ValueError, r"must fit: hidden \(2, 3, 16\),"),
        ({"weight": torch.randn(WORDS, HIDDEN + 1)}, ValueError, r"weight \(101, 17\)"),
        ({"weight": torch.randn(HIDDEN)}, ValueError, r"weight \(16,\)"),
        (
            {"hidden": torch.randn(TOKENS), "weight": torch.randn(HIDDEN)},
            ValueError,
            r"hidden \(37,\)",
        ),
        ({"targets": torch.zeros(TOKENS + 1, dtype=torch.int64)}, ValueError, r"targets \(38,\)"),
        ({"targets": torch.zeros(1, TOKENS, dtype=torch.int64)}, ValueError, r"targets \(1, 37\)"),
        ({"targets": torch.rand(TOKENS, WORDS)}, TypeError, "must be tensors, and targets int64"),
        ({"targets": torch.zeros(TOKENS, dtype=torch.int32)}, TypeError, "targets int64 indices"),
        ({"hidden": [1.0]}, TypeError, "hidden, weight and targets must be tensors"),
        ({"targets": None}, TypeError, "hidden, weight and targets must be tensors"),
        (
            {"hidden": torch.zeros(TOKENS, HIDDEN).bfloat16()},
            TypeError,
            "torch.bfloat16 and weight torch.float32",
        ),
        (
            {
                "hidden": torch.zeros(TOKENS, HIDDEN).long(),
                "weight": torch.zeros(WORDS, HIDDEN).long(),
            },
            TypeError,
            "hidden is torch.int64 and weight torch.int64",
        ),
        ({"bias": torch.randn(WORDS)}, TypeError, "with a bias is not known here: use one without"),
        ({"reduction": "none"}, ValueError, '"mean" or "sum", but they are 512 and \'none\''),
        ({"tile_words": 0}, ValueError, "tile_words must be a positive int .* they are 0 and"),
        ({"tile_words": 2.0}, ValueError, "they are 2.0 and"),
        ({"tile_words": True}, ValueError, "they are True and"),
        ({"targets": torch.full((TOKENS,), WORDS)}, ValueError, "Targets must be 0 to 100 or"),
        ({"targets": torch.full((TOKENS,), -1)}, ValueError, "one is -1"),
        (
            {"ignore_index": 5, "targets": torch.full((TOKENS,), -100)},
            ValueError,
            "0 to 100 or 5: one is -100",
        ),
    ],
)
def test_bad_input_is_refused(change, error, message):
    hidden, weight, targets = problem()
    given = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(error, match=message):
        tiled_linear_cross_entropy(**given)


# --- The tied embedding: the same gradients -------------------------------------------------------


class Tied(nn.Module):
    """The smallest model with a tied embedding."""

    def __init__(self, words=20, width=8, **options):
        super().__init__()
        torch.manual_seed(0)
        self.token_embedding = nn.Embedding(words, width, **options)
        self.head = nn.Linear(width, words)
        self.head.weight = self.token_embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.token_embedding(tokens)))


def run_tied(model):
    tokens = torch.tensor([[1, 3, 3, 0], [7, 1, 1, 1]])  # some words often
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1).flatten())


MODELS = pytest.mark.parametrize(
    ("make", "run"),
    [
        (small_gpt, run_gpt),
        (small_gpt2, run_hugging_face),
        (small_llama, run_hugging_face),
        (functools.partial(small_llama, pad_token_id=3), run_hugging_face),
    ],
    ids=["gpt", "gpt2", "llama", "llama with padding"],
)
LOSSES = pytest.mark.parametrize("loss", ["plain", "fused", "tiled"])
TILED = functools.partial(tiled_linear_cross_entropy, tile_words=90)


@MODELS
@LOSSES
@pytest.mark.parametrize("order", ["tied first", "loss first"])
def test_a_model_trains_the_same(make, run, loss, order):
    model = make()
    expected, wanted = loss_and_gradients(model, run)
    names = [name for name, _ in model.named_parameters()]
    apply = {
        "plain": lambda m: None,
        "fused": apply_fused_loss,
        "tiled": functools.partial(apply_fused_loss, loss=TILED),
    }
    both_of_them = [apply_tied_embedding, apply[loss]]
    handles = [
        one(model) for one in (both_of_them if order == "tied first" else both_of_them[::-1])
    ]
    for _ in range(2):  # with a second step
        got, gradients = loss_and_gradients(model, run)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
        assert largest_difference(gradients, wanted) < 1e-5
    assert [name for name, _ in model.named_parameters()] == names
    for handle in handles:
        if handle is not None:
            handle.remove()
    again, gradients = loss_and_gradients(model, run)
    assert torch.equal(again, expected) and largest_difference(gradients, wanted) == 0


@pytest.mark.parametrize("padding_idx", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_in_double_precision_the_gradients_are_equal_whatever_the_padding(padding_idx, dtype):
    model = Tied(padding_idx=padding_idx).double()
    run = lambda m: m(torch.tensor([[1, 3, 3, 0], [7, 1, 1, 1]], dtype=dtype)).square().mean()  # noqa: E731
    _, wanted = loss_and_gradients(model, run)
    apply_tied_embedding(model)
    _, gradients = loss_and_gradients(model, run)
    assert largest_difference(gradients, wanted) < 1e-14


@pytest.mark.parametrize(
    "tokens", [torch.tensor(3), torch.tensor([3, 3]), torch.zeros(0, dtype=torch.int64)]
)
def test_one_token_a_row_and_none(tokens):
    model = Tied(width=100).double()  # wider than the 64 columns that are summed at once
    run = lambda m: m(tokens).square().sum()  # noqa: E731
    _, wanted = loss_and_gradients(model, run)
    apply_tied_embedding(model)
    _, gradients = loss_and_gradients(model, run)
    assert all(
        torch.allclose(one, other, rtol=1e-14) for one, other in zip(gradients, wanted, strict=True)
    )
    assert tokens.numel() == 0 or gradients[0].any()


def test_rows_of_one_word_are_summed_in_fp32():
    """512 times 1: a BF16 sum would stay at 256."""
    model = Tied(words=2, width=1).bfloat16()
    apply_tied_embedding(model)
    model.token_embedding(torch.zeros(512, dtype=torch.int64)).sum().backward()
    assert model.token_embedding.weight.grad.flatten().tolist() == [512, 0]


def test_where_only_one_of_the_two_is_used():
    model = Tied()
    uses = {
        "embedding": lambda m: m.token_embedding(torch.tensor([1, 1, 2])).square().sum(),
        "head": lambda m: m.head(torch.ones(3, 8)).square().sum(),
        "embedding, without grad": lambda m: (
            m.head(m.token_embedding(torch.tensor([1, 2])).detach()).square().sum()
        ),
    }
    wanted = {name: loss_and_gradients(model, use)[1] for name, use in uses.items()}
    apply_tied_embedding(model)
    for name, use in uses.items():
        gradients = loss_and_gradients(model, use)[1]
        assert all(map(torch.equal, gradients, wanted[name])), name


def test_an_output_layer_that_is_used_twice_and_a_graph_that_is_kept():
    model = Tied().double()
    tokens = torch.tensor([[1, 3, 3, 0]])

    def run(model):
        features = torch.tanh(model.token_embedding(tokens))
        return model.head(features).square().mean() + model.head(features.roll(1, 1)).exp().mean()

    _, wanted = loss_and_gradients(model, run)
    apply_tied_embedding(model)
    _, gradients = loss_and_gradients(model, run)
    assert largest_difference(gradients, wanted) < 1e-14
    model.zero_grad()
    loss = run(model)
    loss.backward(retain_graph=True)
    loss.backward()
    assert largest_difference([p.grad / 2 for p in model.parameters()], wanted) < 1e-14


def test_gradients_add_up_over_steps_and_an_optimizer_in_backward_steps_once():
    expected, model = Tied(), Tied()
    reference = torch.optim.SGD(expected.parameters(), lr=0.1)
    run_tied(expected).backward()
    run_tied(expected).backward()
    apply_tied_embedding(model)
    run_tied(model).backward()
    run_tied(model).backward()
    assert (
        largest_difference(
            [p.grad for p in model.parameters()], [p.grad for p in expected.parameters()]
        )
        < 1e-6
    )
    expected.zero_grad()
    model.zero_grad()
    optimizer = optimizer_in_backward(model, lambda p: torch.optim.SGD(p, lr=0.1))
    for _ in range(2):
        run_tied(expected).backward()
        reference.step()
        reference.zero_grad()
        run_tied(model).backward()
        optimizer.step()
    assert not torch.equal(model.head.weight, Tied().head.weight)
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()))


@pytest.mark.parametrize(
    "how", ["checkpointed blocks", "checkpointed head", "offloaded", "autocast"]
)
def test_with_other_techniques(how):
    def run(model):
        if how != "checkpointed head":
            with (
                offload_activations(model, min_bytes=0)
                if how == "offloaded"
                else contextlib.nullcontext()
            ):
                return run_gpt(model)
        tokens, targets = torch.randint(500, (2, 4, 24), generator=torch.Generator().manual_seed(0))

        def per_row(x, y):
            return F.cross_entropy(model.head(x).flatten(0, 1), y.flatten(), reduction="none")

        rows = lambda x, y: per_row(x, y).view(len(y), -1).sum(1)  # noqa: E731
        return in_micro_batches(rows, 2, model.features(tokens), targets).sum() / targets.numel()

    model = small_gpt()
    if how == "autocast":
        apply_mixed_precision(model, torch.bfloat16)
    expected, wanted = loss_and_gradients(model, run)
    if how == "checkpointed blocks":
        apply_gradient_checkpointing(model)
    apply_tied_embedding(model)
    loss, gradients = loss_and_gradients(model, run)
    assert torch.equal(loss, expected)
    assert largest_difference(gradients, wanted) < 1e-5


# --- The tied embedding: the bytes ----------------------------------------------------------------


def test_the_second_gradient_of_the_embedding_is_never_there():
    words, width, tokens = 4096, 64, 32
    parameters = gpt.tiny(layers=1, vocabulary_size=words).parameter_count
    embedding = 4 * words * width

    def build(*applied):
        def build_run():
            model = small_gpt(layers=1, vocabulary_size=words)
            for apply in applied:
                apply(model)
            batch = torch.arange(tokens).view(1, tokens)

            def step():
                loss = model(batch, batch)
                loss.backward()
                model.zero_grad()
                return loss.detach()

            return step

        return build_run

    tiled = functools.partial(
        apply_fused_loss, loss=functools.partial(tiled_linear_cross_entropy, tile_words=64)
    )
    before = measure(build(tiled), device="cpu")
    after = measure(build(tiled, apply_tied_embedding), device="cpu")
    assert [block.bytes for block in before.largest()].count(
        embedding
    ) == 3  # the weight and two gradients of it
    assert [block.bytes for block in after.largest()].count(embedding) == 2
    # At the end of backward: all weights, all gradients, and a few tensors of (tokens, width).
    rows = 4 * tokens * width
    assert 8 * parameters + embedding < before.known_bytes <= 8 * parameters + embedding + 4 * rows
    assert 8 * parameters < after.known_bytes <= 8 * parameters + 8 * rows


def test_the_output_layers_gradient_becomes_grad_without_a_copy():
    model, made = small_gpt(), []

    def gradient_like(weight):
        made.append(torch.empty_like(weight))
        return made[-1]

    apply_tied_embedding(model)
    apply_fused_loss(model, loss=functools.partial(TILED, gradient_like=gradient_like))
    loss = run_gpt(model)
    pointer = made.pop().data_ptr()
    loss.backward()
    assert model.token_embedding.weight.grad.data_ptr() == pointer


# --- The tied embedding: nothing else changes -----------------------------------------------------


def test_the_model_is_as_before_in_all_but_its_gradients():
    model = small_gpt()
    parameter, state = (
        model.head.weight,
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    names, tokens = [name for name, _ in model.named_parameters()], torch.randint(500, (2, 24))
    expected = model(tokens).detach()
    apply_tied_embedding(model)
    assert torch.equal(model(tokens), expected)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)
    model.eval()
    assert torch.equal(model(tokens), expected)
    assert model.head.weight is model.token_embedding.weight is parameter
    assert [name for name, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    model.load_state_dict(state)


def test_after_an_exception_the_output_layer_has_its_parameter_again():
    model = small_gpt()
    expected, wanted = loss_and_gradients(model, run_gpt)
    parameter, forward = model.head.weight, type(model.head).forward
    apply_tied_embedding(model)

    def stop(x):
        assert model.head.weight is not parameter  # what the embedding handed on
        raise ZeroDivisionError

    model.head.forward = stop
    with pytest.raises(ZeroDivisionError):
        run_gpt(model)
    assert model.head.weight is parameter and "weight" not in vars(model.head)
    del model.head.forward
    with pytest.raises(ValueError, match="tokens hold 65 positions"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    assert type(model.head).forward is forward
    loss, gradients = loss_and_gradients(model, run_gpt)
    assert torch.equal(loss, expected) and largest_difference(gradients, wanted) < 1e-5


def test_after_an_interrupt_the_next_forward_or_remove_tidies_up():
    model = small_gpt()
    _, wanted = loss_and_gradients(model, run_gpt)
    handle = apply_tied_embedding(model)

    def stop(x):  # PyTorch calls no hook then
        raise KeyboardInterrupt

    for tidy_up in (lambda: loss_and_gradients(model, run_gpt), handle.remove):
        model.head.forward = stop
        with pytest.raises(KeyboardInterrupt):
            run_gpt(model)
        del model.head.forward
        tidy_up()
        assert model.head.weight is model.token_embedding.weight
    assert all(map(torch.equal, loss_and_gradients(model, run_gpt)[1], wanted))


def test_a_frozen_weight_gets_no_gradient_and_the_others_theirs():
    model = small_gpt()
    model.head.weight.requires_grad_(False)
    _, wanted = loss_and_gradients(model, run_gpt)
    apply_tied_embedding(model)
    _, gradients = loss_and_gradients(model, run_gpt)
    assert model.head.weight.grad is None and all(map(torch.equal, gradients, wanted))


def test_the_model_is_not_held():
    model = small_gpt()
    handle = apply_tied_embedding(model)
    run_gpt(model).backward()
    model.features(
        torch.zeros(1, 4, dtype=torch.int64)
    )  # the embedding handed its weight on, and nobody took it
    gc.collect()
    gc.disable()
    try:
        gone, weight = weakref.ref(model), weakref.ref(model.head.weight)
        del model
        assert gone() is None  # without the garbage collector
    finally:
        gc.enable()
    handle.remove()
    del handle
    assert weight() is None


def test_a_second_derivative_through_the_embedding_is_refused():
    model = Tied()
    apply_tied_embedding(model)
    with pytest.raises(RuntimeError, match="tied embedding has no second derivative"):
        torch.autograd.grad(run_tied(model), model.head.weight, create_graph=True)


def strange_embedding(model):
    class Other(nn.Embedding):
        pass

    model.token_embedding.__class__ = Other


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: setattr(m.token_embedding, "max_norm", 1.0),
            TypeError,
            "has max_norm, scale_grad_by_freq or sp",
        ),
        (
            lambda m: setattr(m.token_embedding, "scale_grad_by_freq", True),
            TypeError,
            "they cannot be kept",
        ),
        (lambda m: setattr(m.token_embedding, "sparse", True), TypeError, "they cannot be kept"),
        (strange_embedding, TypeError, "and an nn.Linear, but they are Other and Linear"),
        (lambda m: setattr(m, "head", nn.Conv1d(1, 1, 1)), TypeError, "are Embedding and Conv1d"),
        (lambda m: setattr(m, "head", nn.Linear(8, 20)), ValueError, "of this Tied share no"),
        (apply_tied_embedding, ValueError, r"forward is replaced already: remove\(\) that first"),
    ],
)
def test_what_cannot_be_tied_is_refused(change, error, message):
    model = Tied()
    change(model)
    with pytest.raises(error, match=message):
        apply_tied_embedding(model)


def test_layers_that_are_not_found_can_be_named():
    tied = Tied()
    model = nn.Sequential(tied.token_embedding, nn.Tanh(), tied.head)
    with pytest.raises(TypeError, match="must be an nn.Embedding and an nn.Linear, but they are"):
        apply_tied_embedding(model)
    with pytest.raises(ValueError, match="of this GPT share no weight"):
        apply_tied_embedding(small_gpt(tied_embeddings=False))
    _, wanted = loss_and_gradients(model, run_tied)
    apply_tied_embedding(model, model[0], model[2])
    _, gradients = loss_and_gradients(model, run_tied)
    assert largest_difference(gradients, wanted) < 1e-6
    assert "TiedLookup" in model[0](torch.tensor([1])).grad_fn.name()


# --- Everything together: on our GPT it is tested in tests/recipe ---------------------------------

LEAST = 1024  # bytes: what is smaller stays near


def make_optimizer(parameters, lr=1e-4):
    options = {"rounding": stochastic_round, "zeros": far_zeros}
    return AdamW8bit(
        parameters, lr=lr, block_size=64, smallest=LEAST // 4, slice_size=1024, **options
    )


def everything(make, blocks_of, run, state, dtype=torch.float32, **options):
    """The fullest composition: its model and its training step."""
    with torch.device("meta"):
        model = make().to(dtype)

    def place(name, like):
        return (far_like if like.nbytes >= LEAST else torch.empty_like)(like, device="cpu")

    materialize(model, state, place)
    stream_parameters(blocks_of(model), min_bytes=LEAST, device="cpu")
    apply_layer_major_micro_batches(model, 1, blocks=blocks_of(model))
    apply_tied_embedding(model)
    apply_fused_loss(model, loss=functools.partial(TILED, gradient_like=far_like))
    optimizer = optimizer_in_backward(model, functools.partial(make_optimizer, **options))
    offload = offload_activations(model, min_bytes=0)

    def step():
        with offload:
            loss = run(model)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, optimizer, step


def everything_on_a_llama(*options, **more):
    layers_of = lambda model: model.model.layers  # noqa: E731
    return everything(small_llama, layers_of, run_hugging_face, *options, **more)


def test_everything_at_once_trains_to_the_weights_of_a_plain_run():
    plain_model = small_llama()
    start = numbers_of(copy.deepcopy(plain_model))
    plain_step = training_step(
        make_optimizer(plain_model.parameters()), lambda: run_hugging_face(plain_model)
    )
    losses = [plain_step().detach() for _ in range(2)]

    model, optimizer, step = everything_on_a_llama(start)
    torch.testing.assert_close([step(), step()], losses, rtol=1e-5, atol=0)
    moved, apart = [], []
    for (name, one), other in zip(model.named_parameters(), plain_model.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-5, name
        moved.append((other - start[name]).detach().abs())
        apart.append((one - other).detach().abs().sum())
    # Two steps of 1e-4. A few numbers differ by more than rounding: those whose moment fell to the
    # next of 256 codes.
    assert min(one.max() for one in moved) > 1.5e-4
    assert sum(apart) < 1e-3 * sum(one.sum() for one in moved)

    # All that is large is far, also the state; and no gradient is left.
    assert all(is_far(p) == (p.nbytes >= LEAST) and p.grad is None for p in model.parameters())
    states = [state for inner in optimizer.optimizers.values() for state in inner.state.values()]
    values = [value for state in states for value in state.values()]
    codes = [v for v in values if isinstance(v, torch.Tensor) and v.dtype == torch.uint8]
    assert codes and all(map(is_far, codes))


def test_everything_at_once_learns_in_bf16():
    start = numbers_of(small_llama())
    model, _, step = everything_on_a_llama(start, torch.bfloat16, lr=1e-3)
    losses = [step().item() for _ in range(12)]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert losses[-1] < losses[0] - 0.5, losses


def test_everything_at_once_has_nothing_of_the_embeddings_size_near(tmp_path):
    make = functools.partial(small_gpt, vocabulary_size=4096, layers=1)
    torch.save(make().state_dict(), tmp_path / "weights.pt")

    def lean():
        state = torch.load(tmp_path / "weights.pt", mmap=True)
        return everything(make, lambda model: model.blocks, run_gpt, state)[2]

    def plainly():
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        return training_step(optimizer, lambda: run_gpt(model))

    before, after = measure(plainly, device="cpu"), measure(lean, device="cpu")
    embedding = 4 * 4096 * 64
    assert max(block.bytes for block in before.largest()) == embedding
    # a matrix of the block that runs
    assert max(block.bytes for block in after.largest()) == 4 * 4 * 64 * 64
    assert after.known_bytes < embedding and before.known_bytes > 6 * embedding


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_the_weight_may_lie_on_the_host_and_so_does_its_gradient():
    hidden, weight, targets = problem()
    expected, wanted = both(plain, hidden, weight, targets)
    there = hidden.detach().cuda().requires_grad_()
    pinned = weight.detach().pin_memory().requires_grad_()
    options = {"tile_words": 20, "gradient_like": functools.partial(far_like, device="cuda")}
    loss = tiled_linear_cross_entropy(there, pinned, targets.cuda(), **options)
    loss.backward()
    assert loss.is_cuda and there.grad.is_cuda and pinned.grad.is_pinned()
    torch.testing.assert_close(loss.detach().cpu(), expected)
    assert largest_difference([there.grad.cpu(), pinned.grad], wanted) < 1e-5


@pytest.mark.gpu
def test_on_a_gpu_a_model_trains_the_same():
    expected, wanted = loss_and_gradients(small_gpt(), run_gpt)
    model = small_gpt().cuda()
    apply_tied_embedding(model)
    apply_fused_loss(model, loss=TILED)
    tokens, targets = torch.randint(500, (2, 2, 24), generator=torch.Generator().manual_seed(0))
    targets[0, :5] = -100
    loss, gradients = loss_and_gradients(model, lambda m: m(tokens.cuda(), targets.cuda()))
    torch.testing.assert_close(loss.cpu(), expected)
    assert largest_difference([one.cpu() for one in gradients], wanted) < 1e-4
