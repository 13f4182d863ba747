"""The fused linear and cross-entropy: the loss and gradients of the plain one, without its logits,
in a function and applied from outside to our GPT, our ViT and models of Hugging Face."""

import functools
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from memlab import measure
from memlab.techniques.compilation_and_fusion import (
    UncomputedLogits,
    apply_fused_loss,
    linear_cross_entropy,
)
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing
from memlab.techniques.large_vocabulary import tiled_linear_cross_entropy
from memlab.techniques.mixed_precision import apply_mixed_precision
from memlab.workloads import gpt, vit
from tests.helpers import (
    largest_difference,
    run_gpt,
    run_hugging_face,
    small_gpt,
    small_gpt2,
    small_llama,
    training_step,
)

TOKENS, HIDDEN, VOCABULARY = 37, 16, 101  # no multiple of a chunk of 5: the last chunk is short


def problem(dtype=torch.float32, bias=True, ignored=0, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    hidden, weight = draw(TOKENS, HIDDEN), draw(VOCABULARY, HIDDEN)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[:ignored] = -100
    return hidden, weight, targets.to(device), draw(VOCABULARY) if bias else None


def plain(hidden, weight, targets, bias=None, **options):
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, **options)


def loss_and_gradients(function, hidden, weight, targets, bias=None, factor=1.0, **options):
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    loss = function(hidden, weight, targets, bias, **options)
    (factor * loss).backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


# --- The same loss and gradients ------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, 1000, None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_the_plain_loss(chunk_tokens, reduction, bias):
    given = problem(bias=bias, ignored=6)
    expected, wanted = loss_and_gradients(plain, *given, reduction=reduction, factor=3.0)
    loss, gradients = loss_and_gradients(
        linear_cross_entropy, *given, reduction=reduction, factor=3.0, chunk_tokens=chunk_tokens
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert largest_difference(gradients, wanted) < 2e-6
    assert not gradients[0][:6].any()  # the ignored tokens


def test_in_double_precision_the_difference_is_that_of_double_precision():
    given = problem(torch.float64)

    # `plain` would round its logits to FP32.
    def exact(hidden, weight, targets, bias):
        return F.cross_entropy(F.linear(hidden, weight, bias), targets)

    expected, wanted = loss_and_gradients(exact, *given)
    loss, gradients = loss_and_gradients(linear_cross_entropy, *given, chunk_tokens=5)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    assert largest_difference(gradients, wanted) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "16-bit weights"])
def test_in_16_bits_it_is_as_near_to_the_exact_gradients_as_the_plain_loss(dtype, how):
    exact = problem(torch.float64)
    _, wanted = loss_and_gradients(
        lambda hidden, weight, targets, bias: F.cross_entropy(
            F.linear(hidden, weight, bias), targets
        ),
        *exact,
    )
    given = problem(torch.float32 if how == "autocast" else dtype)
    errors, types = {}, {}
    for function in (plain, linear_cross_entropy):
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            leaves = [leaf for leaf in (given[0], given[1], given[3])]
            for leaf in leaves:
                leaf.grad = None
            loss = function(*given)
        assert loss.dtype == torch.float32
        (1024 * loss).backward()  # as a loss scaler does it
        errors[function] = largest_difference([leaf.grad / 1024 for leaf in leaves], wanted)
        types[function] = [leaf.grad.dtype for leaf in leaves]
    assert types[plain] == types[linear_cross_entropy]
    assert errors[linear_cross_entropy] < 1.5 * errors[plain] < 0.1


def test_the_gradient_of_16_bit_weights_is_summed_in_fp32():
    """256 chunks that each add 1 to what is 256 already: a BF16 sum would stay at 256."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, targets, reduction="sum", chunk_tokens=1).backward()
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]  # -(1 - 1/2) and 1/2, 512 times
    small = weight.grad / 512
    weight.grad = None
    linear_cross_entropy(hidden, weight, targets, chunk_tokens=1).backward()
    assert torch.equal(weight.grad, small)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", ["all ignored", "no tokens", "large logits", "a word ignored"])
def test_in_odd_cases_it_does_what_cross_entropy_does(case, reduction):
    hidden, weight, targets, bias = problem(ignored=TOKENS if case == "all ignored" else 0)
    options = {"reduction": reduction}
    if case == "no tokens":
        hidden, targets = hidden.detach()[:0].requires_grad_(), targets[:0]
    if case == "large logits":  # they overflow exp
        with torch.no_grad():
            weight *= 1000
    if case == "a word ignored":
        targets[3] = targets[8] = options["ignore_index"] = 7
    expected, wanted = loss_and_gradients(plain, hidden, weight, targets, bias, **options)
    loss, gradients = loss_and_gradients(
        linear_cross_entropy, hidden, weight, targets, bias, **options
    )
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert loss.isnan() == (reduction == "mean" and case in ("all ignored", "no tokens"))
    torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-5 * max(1, loss.nan_to_num()))


# --- What is not needed is not computed -----------------------------------------------------------


@pytest.mark.parametrize(
    ("frozen", "products"), [((), 3), ((0,), 2), ((1,), 2), ((0, 1), 1), ((0, 1, 3), 1)]
)
def test_a_gradient_that_nobody_needs_costs_no_operation(frozen, products):
    given = problem()
    for index in frozen:
        given[index].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(*given)
        if loss.requires_grad:
            loss.backward()
    assert counter.get_total_flops() == products * 2 * TOKENS * HIDDEN * VOCABULARY
    assert [given[index].grad is None for index in (0, 1, 3)] == [
        index in frozen for index in (0, 1, 3)
    ]


def test_without_grad_there_is_one_product_and_nothing_is_kept():
    given = problem()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(*given)
    assert counter.get_total_flops() == 2 * TOKENS * HIDDEN * VOCABULARY
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(*given).detach())


def test_the_operations_are_those_of_the_plain_loss():
    counts = []
    for function in (plain, linear_cross_entropy):
        with FlopCounterMode(display=False) as counter:
            function(*problem()).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# --- The bytes ------------------------------------------------------------------------------------


def build_loss(
    function, tokens=256, hidden=32, vocabulary=1024, dtype=torch.float32, learns=True, **options
):
    def build():
        torch.manual_seed(0)
        inputs = torch.randn(tokens, hidden).to(dtype).requires_grad_(learns)
        weight = torch.randn(vocabulary, hidden).to(dtype).requires_grad_(learns)
        targets = torch.randint(vocabulary, (tokens,))

        def step():
            loss = function(inputs, weight, targets, **options)
            if learns:
                loss.backward()
                inputs.grad = weight.grad = None
            return loss.detach()

        return step

    return build


@pytest.mark.parametrize("chunk_tokens", [16, 64, 256])
def test_the_peak_is_what_the_formula_says(chunk_tokens):
    tokens, hidden, vocabulary = 256, 32, 1024
    peak = measure(
        build_loss(linear_cross_entropy, chunk_tokens=chunk_tokens), device="cpu"
    ).known_bytes
    inputs = 4 * tokens * hidden + 4 * vocabulary * hidden + 8 * tokens
    gradients = 4 * tokens * hidden + 4 * vocabulary * hidden
    chunk = (
        4 * chunk_tokens * (vocabulary + hidden)
    )  # the logits, and the product on its way into a gradient
    # A word (8 bytes), a bool, the target's logit and the sum (4 each) a token, and some numbers.
    small = 17 * chunk_tokens
    assert inputs + gradients + chunk + small <= peak <= inputs + gradients + chunk + small + 64
    # The plain loss holds three tensors of the size of all logits.
    whole = measure(build_loss(plain), device="cpu").known_bytes
    assert (
        inputs + 3 * 4 * tokens * vocabulary <= whole <= inputs + 3 * 4 * tokens * vocabulary + 64
    )


def test_without_grad_one_chunk_is_all():
    tokens, hidden, vocabulary, chunk = 256, 32, 1024, 16
    peak = measure(
        build_loss(linear_cross_entropy, learns=False, chunk_tokens=chunk), device="cpu"
    ).known_bytes
    inputs = 4 * tokens * hidden + 4 * vocabulary * hidden + 8 * tokens
    logits = 4 * chunk * vocabulary
    assert inputs + logits <= peak < inputs + 1.05 * logits


def test_bf16_weights_cost_an_fp32_sum_of_their_gradient_and_no_product_beside_it():
    tokens, hidden, vocabulary, chunk = 256, 64, 2048, 8
    build = build_loss(
        linear_cross_entropy, tokens, hidden, vocabulary, dtype=torch.bfloat16, chunk_tokens=chunk
    )
    peak = measure(build, device="cpu").known_bytes
    inputs = 2 * tokens * hidden + 2 * vocabulary * hidden + 8 * tokens
    # The sum, and beside it, in backward, the 16-bit gradient that it becomes. Both at once only
    # there.
    kept = 2 * tokens * hidden + 4 * vocabulary * hidden
    # A quarter more for the product's scratch memory, which depends on the processor. A product
    # beside it would double it.
    assert peak < inputs + kept + 1.25 * 2 * vocabulary * hidden


def test_the_gradient_is_given_away_not_copied():
    """What forward computed is what the leaf's `grad` is."""
    hidden, weight, targets, _ = problem(bias=False)
    loss = linear_cross_entropy(hidden, weight, targets)
    kept = [one.data_ptr() for one in loss.grad_fn.gradients[:2]]
    loss.backward()
    assert [hidden.grad.data_ptr(), weight.grad.data_ptr()] == kept


def test_the_inputs_are_not_kept():
    hidden = torch.randn(TOKENS, HIDDEN)
    _, weight, targets, _ = problem()
    product = hidden * 2  # not a leaf: nobody else holds it
    gone = weakref.ref(product)
    loss = linear_cross_entropy(product, weight, targets)
    del product
    assert gone() is None
    loss.backward()


# --- What cannot be done is refused ---------------------------------------------------------------


def test_a_second_backward_is_refused():
    given = problem()
    loss = linear_cross_entropy(*given)
    loss.backward(retain_graph=True)
    first = given[1].grad.clone()
    with pytest.raises(RuntimeError, match="gave its gradients away in the first backward"):
        loss.backward()
    assert torch.equal(given[1].grad, first)


def test_a_second_derivative_is_refused():
    given = problem()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(*given), given[1], create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(2, 3, HIDDEN)}, ValueError, r"hidden \(2, 3, 16\)"),
        ({"weight": torch.randn(VOCABULARY, HIDDEN + 1)}, ValueError, r"weight \(101, 17\)"),
        ({"weight": torch.randn(HIDDEN)}, ValueError, r"weight \(16,\)"),
        ({"targets": torch.zeros(TOKENS + 1, dtype=torch.int64)}, ValueError, r"targets \(38,\)"),
        ({"bias": torch.randn(3)}, ValueError, r"bias \(3,\)"),
        ({"targets": torch.rand(TOKENS, VOCABULARY)}, TypeError, "int64 indices, but they are"),
        ({"targets": torch.zeros(TOKENS, dtype=torch.int32)}, TypeError, "torch.int32"),
        (
            {"hidden": torch.zeros(TOKENS, HIDDEN, dtype=torch.int64)},
            TypeError,
            "hidden must be floating",
        ),
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor"),
        (
            {"hidden": torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)},
            TypeError,
            "convert one, or use autoc",
        ),
        ({"hidden": torch.zeros(TOKENS, HIDDEN, device="meta")}, ValueError, "on cpu and meta"),
        ({"reduction": "none"}, ValueError, '"mean" or "sum", but it is \'none\''),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be a positive int"),
        ({"chunk_tokens": 2.0}, ValueError, "chunk_tokens must be a positive int"),
        ({"targets": torch.full((TOKENS,), VOCABULARY)}, ValueError, "0 to 100, or -100 to be"),
        ({"targets": torch.full((TOKENS,), -1)}, ValueError, "but one is -1"),
        (
            {"ignore_index": 5, "targets": torch.full((TOKENS,), -100)},
            ValueError,
            "or 5 to be ignored",
        ),
    ],
)
def test_bad_input_is_refused(change, error, message):
    hidden, weight, targets, bias = problem()
    given = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**given)


# --- Applied from outside -------------------------------------------------------------------------


def gradients_of(model, run, factor=1.0):
    model.zero_grad()
    loss = run(model)
    (factor * loss).backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def run_vit(model):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, 32, 32, generator=generator)
    return model(images, torch.randint(model.config.classes, (4,), generator=generator))


def small_vit():
    torch.manual_seed(0)
    return vit.ViT(vit.small(layers=2, hidden=32, classes=300))


@pytest.mark.parametrize(
    ("make", "run"),
    [
        (small_gpt, run_gpt),
        (lambda: small_gpt(tied_embeddings=False), run_gpt),
        (small_vit, run_vit),  # its head has a bias
    ],
    ids=["gpt", "untied gpt", "vit"],
)
def test_a_model_trains_the_same(make, run):
    model = make()
    expected, wanted = gradients_of(model, run)
    handle = apply_fused_loss(model, chunk_tokens=7)
    loss, gradients = gradients_of(model, run)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert 0 < largest_difference(gradients, wanted) < 5e-6  # not 0: it did take the other way
    handle.remove()
    again, gradients = gradients_of(model, run)
    assert torch.equal(again, expected) and largest_difference(gradients, wanted) == 0
    assert "forward" not in vars(model.head)
    handle.remove()  # a second time does nothing


def test_the_logits_are_not_there_in_training_and_are_in_evaluation():
    model = small_gpt()
    tokens = torch.randint(500, (2, 24))
    expected = model(tokens).detach()
    apply_fused_loss(model)
    logits = model(tokens)
    assert isinstance(logits, UncomputedLogits)
    assert logits.shape == logits.size() == expected.shape and logits.size(-1) == 500
    assert logits.device == expected.device
    assert torch.equal(logits.compute(), expected)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)
    model.eval()
    assert torch.equal(model(tokens), expected)


def test_the_shapes_that_training_loops_use():
    model = small_gpt()
    tokens = torch.randint(500, (2, 24))
    logits = model(tokens)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 500), tokens[:, 1:].flatten())
    apply_fused_loss(model)
    logits = model(tokens)
    targets = tokens[:, 1:].flatten()
    for cut in (
        logits[:, :-1],
        logits[..., :-1, :],
        logits[:, :-1, :],
        logits.float()[:, :-1].contiguous(),
    ):
        assert cut.shape == (2, 23, 500)
        flat = (
            cut.view(-1, 500),
            cut.reshape((46, 500)),
            cut.flatten(0, 1),
            cut.flatten(end_dim=-2),
            cut.view(-1, cut.size(-1)),
        )
        for logits_2d in flat:
            loss = nn.CrossEntropyLoss()(logits_2d, targets)
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
            assert "LinearCrossEntropy" in loss.grad_fn.name()
    assert torch.isclose(
        F.cross_entropy(input=logits[0], target=tokens[0]), F.cross_entropy(logits[0], tokens[0])
    )


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda logits, targets: logits / 30, "scaling or soft-capping"),
        (lambda logits, targets: 0.5 * logits, "scaling or soft-capping"),
        (lambda logits, targets: torch.tanh(logits), "tanh needs them"),
        (lambda logits, targets: torch.ones(500) * logits, "needs them"),
        (lambda logits, targets: logits.view(-1), r"view\(-1,\)"),
        (lambda logits, targets: logits.view(-1, 250), r"view\(-1, 250\)"),
        (lambda logits, targets: logits.flatten(), r"flatten\(0, -1\)"),
        (lambda logits, targets: logits[..., :250], "the index"),
        (lambda logits, targets: logits[..., 0], "the index"),
        (lambda logits, targets: logits[None, 0, 0, 1], "the index"),
        (
            lambda logits, targets: F.cross_entropy(
                logits.flatten(0, 1), targets, label_smoothing=0.1
            ),
            "label_smoothing=",
        ),
        (
            lambda logits, targets: F.cross_entropy(
                logits.flatten(0, 1), targets, weight=torch.ones(500)
            ),
            "weight=",
        ),
        (lambda logits, targets: F.nll_loss(logits.flatten(0, 1), targets), "nll_loss"),
        (lambda logits, targets: F.cross_entropy(torch.randn(48, 500), logits), "cross_entropy"),
    ],
)
def test_anything_else_with_the_logits_is_refused(use, what):
    model = small_gpt()
    apply_fused_loss(model)
    tokens = torch.randint(500, (2, 24))
    with pytest.raises(TypeError, match=what) as caught:
        use(model(tokens), tokens.flatten())
    assert "Call compute()" in str(caught.value)


def test_an_unknown_method_is_refused():
    model = small_gpt()
    apply_fused_loss(model)
    logits = model(torch.randint(500, (2, 24)))
    with pytest.raises(AttributeError, match="softmax needs them. Call compute"):
        logits.softmax(-1)


def test_a_wrong_head_is_refused():
    with pytest.raises(ValueError, match="No output layer found in Sequential: pass head="):
        apply_fused_loss(nn.Sequential(nn.Linear(3, 4)))
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(1, 1, 1))
    with pytest.raises(TypeError, match="plain nn.Linear, but it is Conv1d"):
        apply_fused_loss(model, model[1])
    with pytest.raises(ValueError, match="no part of this Sequential"):
        apply_fused_loss(model, nn.Linear(3, 4))
    with pytest.raises(ValueError, match="chunk_tokens must be"):
        apply_fused_loss(model, model[0], chunk_tokens=-1)
    apply_fused_loss(model, model[0])
    with pytest.raises(ValueError, match="fused already"):
        apply_fused_loss(model, model[0])
    assert isinstance(model[0](torch.randn(2, 3)), UncomputedLogits)


@pytest.mark.parametrize("make", [small_gpt, small_vit])
def test_another_loss_takes_the_place_of_ours(make):
    run, given = run_gpt if make is small_gpt else run_vit, []

    def loss(hidden, weight, targets, bias, *, ignore_index, reduction):
        given.append(
            (
                hidden.shape,
                weight is model.head.weight,
                bias is model.head.bias,
                ignore_index,
                reduction,
            )
        )
        return 2 * linear_cross_entropy(hidden, weight, targets, bias, chunk_tokens=3)

    model = make()
    expected, wanted = gradients_of(model, run, factor=2.0)
    handle = apply_fused_loss(model, loss=loss)
    got, gradients = gradients_of(model, run)
    tokens = (2 * 24, 64) if make is small_gpt else (4, 32)
    assert given == [(tokens, True, True, -100, "mean")]
    torch.testing.assert_close(got, 2 * expected)
    assert 0 < largest_difference(gradients, wanted) < 5e-6
    with torch.no_grad():
        torch.testing.assert_close(run(model), expected)
    handle.remove()
    assert torch.equal(gradients_of(model, run)[0], expected) and len(given) == 1


def test_another_loss_gets_what_cross_entropy_was_given_in_the_same_autocast():
    given = []

    def loss(hidden, weight, targets, bias, **options):
        given.append((options, torch.is_autocast_enabled("cpu")))
        return hidden.sum()

    model, tokens = small_gpt(), torch.randint(500, (2, 24))
    apply_fused_loss(model, loss=loss)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=7, reduction="sum"
    )
    assert given == [({"ignore_index": 7, "reduction": "sum"}, True)]


def test_with_the_loss_in_tiles_a_bias_is_refused_and_without_one_it_trains_the_same():
    tiled = functools.partial(tiled_linear_cross_entropy, tile_words=90)
    expected, wanted = gradients_of(small_gpt(), run_gpt)
    model = small_gpt()
    apply_fused_loss(model, loss=tiled)
    loss, gradients = gradients_of(model, run_gpt)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert 0 < largest_difference(gradients, wanted) < 5e-6
    model = small_vit()
    apply_fused_loss(model, loss=tiled)
    with pytest.raises(TypeError, match="output layer with a bias is not known here"):
        run_vit(model)


@pytest.mark.parametrize("loss", [None, "tiled", torch.ones(())])
def test_a_loss_that_is_no_function_is_refused(loss):
    model = small_gpt()
    with pytest.raises(TypeError, match="loss must be a function like linear_cross_entropy, but"):
        apply_fused_loss(model, loss=loss)
    assert "forward" not in vars(model.head)


def test_another_loss_takes_no_chunk_tokens():
    with pytest.raises(ValueError, match="chunk_tokens is linear_cross_entropy's"):
        apply_fused_loss(small_gpt(), loss=lambda *_, **__: None, chunk_tokens=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_mixed_precision(dtype):
    exact, wanted = gradients_of(small_gpt(), run_gpt)
    errors = {}
    for fused in (False, True):
        model = small_gpt()
        apply_mixed_precision(model, dtype)
        if fused:
            apply_fused_loss(model)
        loss, gradients = gradients_of(model, run_gpt, factor=1024.0)
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        errors[fused] = largest_difference([gradient / 1024 for gradient in gradients], wanted)
        assert abs(loss - exact) < 0.01 * exact
    assert 1e-5 < errors[True] < 1.5 * errors[False] < 0.1


def test_autocast_is_remembered_where_the_loss_is_outside_of_it():
    model = small_gpt()
    apply_fused_loss(model)
    tokens = torch.randint(500, (2, 24))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        inside = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert torch.equal(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), inside)
    assert logits.compute().dtype == torch.bfloat16


def test_with_gradient_checkpointing():
    expected, wanted = gradients_of(small_gpt(), run_gpt)
    model = small_gpt()
    apply_gradient_checkpointing(model)
    apply_fused_loss(model)
    loss, gradients = gradients_of(model, run_gpt)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert largest_difference(gradients, wanted) < 5e-6


def build_training(prepare=None, vocabulary=4096):
    def build():
        model = small_gpt(vocabulary_size=vocabulary)
        if prepare is not None:
            prepare(model)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        tokens = torch.randint(vocabulary, (4, 64))

        return training_step(optimizer, lambda: model(tokens, tokens))

    return build


def test_a_training_step_has_no_logits_at_its_peak():
    before = measure(build_training(), device="cpu")
    after = measure(build_training(apply_fused_loss), device="cpu")
    logits = 4 * 4 * 64 * 4096
    assert max(block.bytes for block in before.largest()) == logits
    weight = 4 * 4096 * 64  # and a chunk of as many tokens as the hidden size
    assert max(block.bytes for block in after.largest()) == weight
    assert before.known_bytes - after.known_bytes > 3 * logits - 2.2 * weight


# --- Hugging Face ---------------------------------------------------------------------------------


def hugging_face_model(transformers, name):
    if name == "gpt2":
        return small_gpt2()
    if name == "llama":
        return small_llama(tie_word_embeddings=False)
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=400,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=64,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=30.0,
    )
    return transformers.Gemma2ForCausalLM(config).train()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_hugging_face_model_trains_the_same(transformers, name):
    model = without_dropout(hugging_face_model(transformers, name))
    expected, wanted = gradients_of(model, run_hugging_face)
    apply_fused_loss(model, chunk_tokens=7)
    loss, gradients = gradients_of(model, run_hugging_face)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert 0 < largest_difference(gradients, wanted) < 1e-5
    tokens = torch.randint(400, (2, 20))
    assert isinstance(model(input_ids=tokens, labels=tokens).logits, UncomputedLogits)
    with torch.no_grad():
        assert model(input_ids=tokens, labels=tokens).logits.shape == (2, 20, 400)


def test_soft_capped_logits_are_refused(transformers):
    model = hugging_face_model(transformers, "gemma2")
    assert run_hugging_face(model).isfinite()
    handle = apply_fused_loss(model)
    with pytest.raises(TypeError, match="scaling or soft-capping them needs them"):
        run_hugging_face(model)
    handle.remove()
    assert run_hugging_face(model).isfinite()


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_loss_and_gradients_are_those_of_the_plain_loss(dtype):
    given = problem(dtype, ignored=6, device="cuda")
    expected, wanted = loss_and_gradients(plain, *given)
    loss, gradients = loss_and_gradients(linear_cross_entropy, *given, chunk_tokens=5)
    torch.testing.assert_close(
        loss, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0
    )
    assert largest_difference(gradients, wanted) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait():
    """Nothing in forward or backward reads a number from the device."""
    given = problem(device="cuda")
    linear_cross_entropy(*given).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*given).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
