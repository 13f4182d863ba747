"""Lean optimizers: the state's bytes by hand count, what a step needs on top, updates that are
those of AdamW, and a state that survives saving and loading bit for bit."""

import copy
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memlab import measure
from memlab.techniques import lean_optimizers
from memlab.techniques.lean_optimizers import (
    AdamW8bit,
    Apollo,
    Lion,
    code_table,
    dequantize,
    quantize,
)
from memlab.techniques.low_precision import stochastic_round
from memlab.techniques.offloading import far_like, far_zeros
from memlab.workloads import gpt, vit
from tests.helpers import is_far

BLOCK, SMALLEST = 256, 4096


def make_gpt():
    return gpt.GPT(gpt.tiny(layers=2))


def gpt_step(model, optimizer, seed):
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(seed))
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def state_bytes(optimizer):
    return sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def expected_8bit(shapes, block_size=BLOCK, smallest=SMALLEST):
    """Two codes a number and two scales of 4 bytes a block; small tensors two FP32 numbers."""
    total = 0
    for count in map(math.prod, shapes):
        total += 8 * count if count < smallest else 2 * -(-count // block_size) * (block_size + 4)
    return total


# --- Eight bits a number --------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_a_table_has_256_values_in_order_with_zero_and_one(signed, dynamic):
    table = code_table(signed, dynamic=dynamic)
    assert table.shape == (256,) and table.dtype == torch.float32
    assert (table.diff() > 0).all()
    assert 0.0 in table and table[-1] == 1.0
    assert -1 < table[0] < -0.99 if signed else table[0] == 0


def test_the_dynamic_table_is_fine_near_zero():
    signed, unsigned = code_table(True), code_table(False)
    assert signed[signed > 0].min() == pytest.approx(0.55e-6) and unsigned[1] == pytest.approx(
        3.25e-7
    )
    # Each power of ten has twice as many values as the one below it.
    counts = [
        ((unsigned > 10.0**-k) & (unsigned < 10.0 ** (1 - k))).sum().item() for k in range(1, 8)
    ]
    assert counts == [128, 64, 32, 16, 8, 4, 2]


def test_the_tables_value_by_value():
    assert torch.equal(code_table(True, dynamic=False), torch.arange(-127, 129) / 128)
    assert torch.equal(code_table(False, dynamic=False), torch.arange(256) / 255)
    for signed in (True, False):
        values = [0.0, 1.0]
        for power in range(
            7
        ):  # 0.1 to 1 in equal parts, twice as many as for the power below; their middles
            count = 2 ** (power if signed else power + 1)
            middles = [
                (0.1 + 0.9 * (part + 0.5) / count) * 10.0 ** (power - 6) for part in range(count)
            ]
            values += middles + [-middle for middle in middles if signed]
        torch.testing.assert_close(
            code_table(signed), torch.tensor(sorted(values)), rtol=1e-6, atol=0
        )


def test_a_table_is_made_anew_also_after_one_was_made_without_memory_or_changed():
    expected = code_table(True)
    lean_optimizers._code_values.cache_clear()
    with torch.device("meta"):
        code_table(True)
    code_table(True).zero_()
    assert torch.equal(code_table(True), expected)


def test_the_tables_and_codes_are_those_of_torchao():
    utilities = pytest.importorskip("torchao.optim.quant_utils")
    values = torch.randn(64, 256) ** 3 * 1e-4
    for signed in (True, False):
        table = code_table(signed)
        theirs = torch.tensor(utilities.create_dynamic_map(signed))
        torch.testing.assert_close(table, theirs, rtol=1e-6, atol=1e-7)
        values = values if signed else values.square()
        scaled, scales = utilities.scale_tensor(values, 256)
        codes = utilities.quantize_8bit_with_qmap(scaled, table)
        ours, our_scales = quantize(values, table)
        assert torch.equal(our_scales, scales)
        assert (
            ours.int() - codes.int()
        ).abs().max() <= 1  # halfway, rounding may fall to either side
        assert (ours != codes).float().mean() < 1e-3


@pytest.mark.parametrize("shape", [(3, 256), (1000,), (7, 5, 11), (1,), (0,)])
@pytest.mark.parametrize("signed", [True, False])
def test_each_number_becomes_the_nearest_of_the_table(shape, signed):
    values, table = torch.randn(shape), code_table(signed)
    values = values if signed else values.square()
    codes, scales = quantize(values, table, 64)
    blocks = -(-values.numel() // 64)
    assert codes.shape == (blocks, 64) and codes.dtype == torch.uint8
    assert scales.shape == (blocks,) and scales.dtype == torch.float32
    again = dequantize(codes, scales, table).view(-1)[: values.numel()].view(shape)
    scale = scales.repeat_interleave(64)[: values.numel()]
    nearest = (values.view(-1, 1) / scale.view(-1, 1) - table).abs().min(1).values * scale
    error = (values - again).abs().view(-1)
    torch.testing.assert_close(error, nearest, rtol=1e-3, atol=1e-6)
    # The largest of each block is kept to within a half of the widest gap, which is below one.
    assert (error <= 0.011 * scale).all()


def test_zeros_stay_zeros_and_what_is_not_finite_is_not_lost():
    table = code_table(True)
    values = torch.zeros(4, 64)
    values[1, 3], values[2, 5], values[3, 7] = float("nan"), float("inf"), 1e-42
    again = dequantize(*quantize(values, table, 64), table)
    assert (again[0] == 0).all()
    assert again[1].isnan().all() and again[2].isnan().any()
    assert again[3].isfinite().all()


def test_quantizing_leaves_the_values_alone_also_where_they_are_not_contiguous():
    values = torch.randn(256, 64).T
    before = values.clone()
    codes, scales = quantize(values, code_table(True))
    assert torch.equal(values, before)
    expected, _ = quantize(before.contiguous(), code_table(True))
    assert torch.equal(codes, expected)


def test_wrong_tables_and_block_sizes_are_refused():
    with pytest.raises(ValueError, match="block_size must be at least 1, but it is 0"):
        quantize(torch.ones(4), code_table(True), 0)
    for table in (code_table(True)[:255], code_table(True).double()):
        with pytest.raises(ValueError, match="table must be 256 FP32 values"):
            quantize(torch.ones(4), table)


# --- Bytes of the state ---------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [64, 256, 2048])
def test_the_8bit_state_is_what_the_formula_says(block_size):
    model = make_gpt()
    optimizer = AdamW8bit(model.parameters(), block_size=block_size)
    gpt_step(model, optimizer, 0)
    assert state_bytes(optimizer) == expected_8bit(
        [p.shape for p in model.parameters()], block_size
    )


def test_the_8bit_state_of_a_vit():
    config = vit.ViTConfig(
        image_size=16, patch_size=4, channels=1, classes=10, layers=2, heads=2, hidden=44
    )
    model = vit.ViT(config)
    optimizer = AdamW8bit(model.parameters())
    F.cross_entropy(model(torch.randn(4, 1, 16, 16)), torch.arange(4)).backward()
    optimizer.step()
    shapes = [parameter.shape for parameter in model.parameters()]
    # 44 wide: the matrices do not end with a whole block, so the last block is filled up.
    assert any(math.prod(shape) >= SMALLEST and math.prod(shape) % BLOCK for shape in shapes)
    assert state_bytes(optimizer) == expected_8bit(shapes)


def test_the_states_of_lion_and_apollo():
    rank, shapes = 8, [parameter.shape for parameter in make_gpt().parameters()]
    model = make_gpt()
    lion = Lion(model.parameters())
    gpt_step(model, lion, 0)
    assert state_bytes(lion) == 4 * sum(map(math.prod, shapes))

    model = make_gpt()
    apollo = Apollo(model.parameters(), rank=rank)
    gpt_step(model, apollo, 0)
    # A matrix: two moments of (rank, larger side), and the norm of the last update, one number.
    expected = sum(8 * rank * max(s) + 4 if len(s) == 2 else 8 * math.prod(s) for s in shapes)
    assert state_bytes(apollo) == expected


def test_what_a_step_needs_on_top():
    """Measured: two moments and one more number for each of a slice, 12 bytes; Lion's
    direction, 4.
    """
    config = gpt.tiny(layers=1)
    shapes = [p.shape for p in gpt.GPT(config).parameters()]
    largest, p = max(map(math.prod, shapes)), config.parameter_count

    def build(make):
        def build_run():
            model = gpt.GPT(config)
            optimizer = make(model.parameters())
            tokens = torch.zeros(1, 2, dtype=torch.int64)
            return lambda: gpt_step_of(model, optimizer, tokens)

        return build_run

    def gpt_step_of(model, optimizer, tokens):
        model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    def on_top(make, state):
        run = measure(build(make), device="cpu")
        assert run.phase == "optimizer" and run.columns["optimizer_state"] == state
        return run.known_bytes - 8 * p - state

    small_print = (
        5000  # the tables, the loss, the tokens, Python numbers that become tensors for a moment
    )
    state = expected_8bit(shapes)
    # Behind the peak of backward, two halves of the tied embedding's gradient, a slice cannot be
    # seen.
    assert 12 * largest <= on_top(AdamW8bit, state) <= 12 * largest + small_print
    sliced = measure(build(lambda ps: AdamW8bit(ps, slice_size=4096)), device="cpu")
    assert sliced.known_bytes <= 8 * p + state + max(12 * 4096, 8 * 256 * 64) + small_print
    assert sliced.known_bytes < 8 * p + state + 12 * largest


# --- The updates ----------------------------------------------------------------------------------


def trained(model, optimizer, steps=5):
    for seed in range(steps):
        gpt_step(model, optimizer, seed)
    return [parameter.detach() for parameter in model.parameters()]


def pair():
    model = make_gpt()
    return model, copy.deepcopy(model)


def test_tensors_below_the_smallest_size_get_adamw_bit_for_bit():
    ours, theirs = pair()
    weights = trained(ours, AdamW8bit(ours.parameters(), lr=1e-2, smallest=10**9))
    expected = trained(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False))
    assert all(map(torch.equal, weights, expected))


def test_vectors_and_small_matrices_get_adamw_bit_for_bit_from_apollo():
    ours, theirs = pair()
    weights = trained(ours, Apollo(ours.parameters(), lr=1e-2, rank=64))
    expected = trained(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False))
    assert all(p.ndim == 1 or min(p.shape) <= 64 for p in ours.parameters())
    assert all(map(torch.equal, weights, expected))


def test_the_first_8bit_step_is_adamws_and_later_ones_are_close():
    ours, theirs = pair()
    optimizer, reference = (
        AdamW8bit(ours.parameters(), lr=1e-3),
        torch.optim.AdamW(theirs.parameters(), lr=1e-3, foreach=False),
    )
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    for steps in (1, 9):
        weights, expected = trained(ours, optimizer, steps), trained(theirs, reference, steps)
        if steps == 1:  # nothing has been read back from 8 bits yet
            assert all(map(torch.equal, weights, expected))
    for weight, other, before in zip(weights, expected, start, strict=True):
        assert 0 <= (weight - other).norm() < 0.2 * (other - before).norm()
    assert any(
        not torch.equal(weight, other) for weight, other in zip(weights, expected, strict=True)
    )


def test_a_slice_and_a_whole_parameter_give_the_same():
    ours, theirs = pair()
    whole = trained(ours, AdamW8bit(ours.parameters(), lr=1e-2))
    sliced = trained(theirs, AdamW8bit(theirs.parameters(), lr=1e-2, slice_size=1000))
    assert all(map(torch.equal, whole, sliced))


@pytest.mark.parametrize("make", [AdamW8bit, Lion, lambda ps: Apollo(ps, rank=4)])
def test_a_transposed_parameter_is_updated_as_a_contiguous_one(make):
    values, gradient = torch.randn(96, 65), torch.randn(96, 65)
    plain = nn.Parameter(values.clone())
    transposed = nn.Parameter(values.T.contiguous().T)
    assert not transposed.is_contiguous()
    for parameter in (plain, transposed):
        optimizer = make([parameter])
        for _ in range(3):
            parameter.grad = gradient.clone() if parameter is plain else gradient.T.contiguous().T
            optimizer.step()
    torch.testing.assert_close(transposed.detach(), plain.detach(), rtol=1e-5, atol=1e-7)
    assert not torch.equal(plain, values)


def test_lion_steps_by_the_sign():
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = Lion([parameter], lr=0.5, betas=(0.5, 0.75), weight_decay=0.0)
    for gradient in ([1.0, -2.0, 0.0, 8.0], [-1.0, 1.0, 0.0, -1.0]):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    # The first step goes against the gradient's signs: (-, +, 0, -). The momentum is then a quarter
    # of that gradient, (0.25, -0.5, 0, 2), and half of it with half of the second gradient has the
    # signs (-, +, 0, +).
    assert parameter.tolist() == [-0.5 + 0.5, 0.5 - 0.5, 0.0, -0.5 - 0.5]


def test_apollo_scales_columns_as_adamw_does():
    """Each number of a first AdamW step is 1 in size, so a column of 64 has the norm 8, whatever
    its gradient's. A projection on 32 rows keeps the norm of a column to within some 1 / sqrt(64),
    and the mean closer."""
    parameter = nn.Parameter(torch.zeros(64, 200))
    gradient = torch.randn(64, 200) * torch.logspace(-6, 2, 200)  # columns of very different sizes
    optimizer = Apollo([parameter], lr=1.0, rank=32, weight_decay=0.0, eps=0.0)
    parameter.grad = gradient
    optimizer.step()
    norms = parameter.detach().norm(dim=0)
    assert norms.mean() == pytest.approx(math.sqrt(64), rel=0.1)
    assert norms.min() > 0.5 * math.sqrt(64) and norms.max() < 2 * math.sqrt(64)
    # The direction of each column is the gradient's.
    cosine = F.cosine_similarity(parameter.detach(), -gradient, dim=0)
    torch.testing.assert_close(cosine, torch.ones(200))


def test_an_apollo_update_grows_by_one_percent_at_most():
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = Apollo([parameter], lr=1.0, rank=8, weight_decay=0.0)
    parameter.grad = torch.zeros(64, 64)
    optimizer.step()  # no gradient at all: nothing moves, and nothing is limited to zero for ever
    assert (parameter == 0).all()
    norms = []
    for size in (1.0, 1.0, 100.0, 1.0):
        before = parameter.detach().clone()
        parameter.grad = size * torch.randn(64, 64)
        optimizer.step()
        norms.append((parameter.detach() - before).norm().item())
    assert norms[0] > 0 and all(
        later <= 1.0101 * earlier for earlier, later in zip(norms, norms[1:], strict=False)
    )


def test_apollo_draws_a_new_projection_after_each_interval_and_the_same_one_again_from_its_seed():
    def steps(**options):
        parameter = nn.Parameter(torch.zeros(32, 48))
        optimizer = Apollo([parameter], rank=4, weight_decay=0.0, **options)
        for number in range(4):
            parameter.grad = torch.randn(32, 48, generator=torch.Generator().manual_seed(number))
            optimizer.step()
        return parameter.detach()

    assert torch.equal(steps(), steps())
    assert not torch.equal(steps(), steps(seed=1))
    assert not torch.equal(steps(), steps(interval=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [AdamW8bit, Lion, Apollo])
def test_weights_of_16_bits_are_trained(make, dtype):
    parameter = nn.Parameter(torch.randn(80, 80).to(dtype))
    before = parameter.detach().clone()
    optimizer = make([parameter], lr=1e-1)
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.dtype == dtype
    assert (parameter.detach() < before).all()


@pytest.mark.parametrize("make", [AdamW8bit, Lion, Apollo])
def test_a_hugging_face_model_learns(make):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "n_positions": 16, "bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=64, **sizes)
    )
    tokens = torch.randint(64, (4, 16))
    optimizer = make(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses
    if make is AdamW8bit:
        assert state_bytes(optimizer) == expected_8bit([p.shape for p in model.parameters()])


def test_equally_spaced_codes_lose_the_second_moment():
    """A second moment below 1/510 of the largest in its block becomes 0, and the next step divides
    by next to nothing."""
    steps = {}
    for dynamic in (True, False):
        parameter = nn.Parameter(torch.zeros(SMALLEST))
        optimizer = AdamW8bit([parameter], lr=1.0, weight_decay=0.0, dynamic=dynamic)
        for scale in (1.0, 1e-3):
            before = parameter.detach().clone()
            parameter.grad = scale * torch.full((SMALLEST,), 1e-2)
            parameter.grad[::BLOCK] = scale  # one number in each block is a hundred times as large
            optimizer.step()
        steps[dynamic] = (parameter.detach() - before).abs().max().item()
    assert steps[True] < 2 and steps[False] > 10 * steps[True]


# --- Rounding, and a state that lies elsewhere ----------------------------------------------------


@pytest.mark.parametrize("count", [SMALLEST - 1, 2**17])  # FP32 moments, and those of 8 bits
def test_updates_below_the_spacing_of_bf16_are_right_in_the_mean(count):
    """Below 1 the next BF16 number is 1/256 away. To the nearest, ten steps of 1e-4 come to
    nothing.
    """
    lr, steps = 1e-4, 10
    moved = {}
    for rounding in (None, stochastic_round):
        parameter = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
        optimizer = AdamW8bit([parameter], lr=lr, weight_decay=0.0, rounding=rounding)
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)  # each step is one learning rate
            optimizer.step()
        moved[rounding] = 1 - parameter.detach().double().mean().item()
    assert moved[None] == 0
    share = 256 * lr  # how often a number moves by 1/256
    deviation = (steps * share * (1 - share) / count) ** 0.5 / 256
    assert (
        moved[stochastic_round] == pytest.approx(steps * lr, abs=5 * deviation)
        and 5 * deviation < lr * steps
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_more_than_16_bits_are_not_rounded(dtype):
    weights = []
    for rounding in (None, lambda exact: pytest.fail("was called")):
        model = make_gpt_of(0).to(dtype)
        weights.append(trained(model, AdamW8bit(model.parameters(), rounding=rounding), 2))
    assert all(map(torch.equal, *weights))


def make_gpt_of(seed):
    torch.manual_seed(seed)
    return make_gpt()


def test_what_a_step_of_16_bit_weights_needs_on_top():
    count = 2**18

    def build(**options):
        def build_run():
            parameter = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
            optimizer = AdamW8bit([parameter], **options)

            def step():
                parameter.grad = torch.ones_like(parameter)
                optimizer.step()
                parameter.grad = None

            return step

        return build_run

    nearest, rounded, sliced = (
        measure(build(**options), device="cpu").known_bytes
        for options in (
            {},
            {"rounding": stochastic_round},
            {"rounding": stochastic_round, "slice_size": 2**13},
        )
    )
    kept, small = (
        2 * 2 * count + expected_8bit([(count,)]),
        5000,
    )  # weights, gradient, state; the tables
    # Moments (8) and denominators (4). To the nearest: the weights that PyTorch converts for a sum
    # of two types (4; the sum itself, in FP32 as well, the operator takes for itself).
    assert kept + 16 * count <= nearest <= kept + 16 * count + small
    # Moments (8), and for their turn the exact weights, random bits (4 each), the rounded ones (2),
    # which are NaN (1).
    assert kept + 19 * count <= rounded <= kept + 19 * count + small
    assert kept + 19 * 2**13 <= sliced <= kept + 20 * 2**13 + small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slice_size", [4096, 2**20])
def test_a_far_state_gives_the_same_weights_bit_for_bit_and_stays_far(dtype, slice_size, tmp_path):
    asked = []

    def zeros(*size, **options):
        asked.append(options)
        return far_zeros(*size, directory=tmp_path, **options)

    def codes_of(optimizer):
        return [
            state[name]
            for state in optimizer.state.values()
            for name in state
            if "exp_avg_scale" in state and name != "step"
        ]

    near, far = make_gpt_of(0).to(dtype), make_gpt_of(0).to(dtype)
    one = AdamW8bit(near.parameters(), slice_size=slice_size)
    other = AdamW8bit(far.parameters(), slice_size=slice_size, zeros=zeros)
    assert all(map(torch.equal, trained(near, one, 3), trained(far, other, 3)))
    large = sum(p.numel() >= SMALLEST for p in far.parameters())
    assert len(codes_of(other)) == 4 * large == len(asked) and all(map(is_far, codes_of(other)))
    assert {options["device"] for options in asked} == {torch.device("cpu")}
    assert not any(map(is_far, codes_of(one)))

    # Through a file, and into the other kind.
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, nearer = AdamW8bit(far.parameters(), zeros=zeros), AdamW8bit(near.parameters())
    again.load_state_dict(state)
    nearer.load_state_dict(other.state_dict())
    assert len(codes_of(again)) == 4 * large and all(map(is_far, codes_of(again)))
    assert not any(map(is_far, codes_of(nearer)))
    assert all(map(torch.equal, codes_of(again), codes_of(other)))
    pointers = {value.data_ptr() for value in codes_of(other)}
    assert not pointers & {value.data_ptr() for value in (*codes_of(again), *codes_of(nearer))}
    assert all(map(torch.equal, trained(far, again, 2), trained(near, nearer, 2)))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))]
)
def test_a_copy_rounds_and_makes_its_state_as_the_original(duplicate):
    parameter = nn.Parameter(torch.ones(SMALLEST, dtype=torch.bfloat16))
    optimizer = AdamW8bit([parameter], lr=1e-4, rounding=stochastic_round, zeros=far_zeros)
    parameter, optimizer = duplicate((parameter, optimizer))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (parameter < 1).any()  # to the nearest, none would be
    assert is_far(optimizer.state[parameter]["exp_avg"])


@pytest.mark.parametrize(
    "options", [{"rounding": 0.5}, {"rounding": True}, {"zeros": None}, {"zeros": "far"}]
)
def test_a_rounding_or_zeros_that_is_no_function_is_refused(options):
    with pytest.raises(TypeError, match="rounding and zeros must be functions, but they are"):
        AdamW8bit([nn.Parameter(torch.zeros(2))], **options)


# --- Saving, loading, copying ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [AdamW8bit, Lion, lambda ps: Apollo(ps, rank=4)])
def test_the_state_survives_saving_and_loading_bit_for_bit(make, dtype):
    model = make_gpt().to(dtype)
    optimizer = make(model.parameters())
    trained(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make_gpt().to(dtype)
    other.load_state_dict(saved["model"])
    resumed = make(other.parameters())
    resumed.load_state_dict(saved["optimizer"])
    for one, two in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if isinstance(one[name], torch.Tensor):
                assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name])
            else:
                assert one[name] == two[name]
    assert all(map(torch.equal, trained(model, optimizer, 3), trained(other, resumed, 3)))


def test_a_loaded_state_shares_no_memory_with_the_saved_one():
    model, other = pair()
    optimizer = AdamW8bit(model.parameters())
    trained(model, optimizer, 1)
    resumed = AdamW8bit(other.parameters())
    state = optimizer.state_dict()
    resumed.load_state_dict(state)
    before = copy.deepcopy(state)
    trained(other, resumed, 2)
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, before["state"][number][name])


def test_loading_for_other_parameters_is_refused():
    model = make_gpt()
    optimizer = AdamW8bit(model.parameters())
    trained(model, optimizer, 1)
    with pytest.raises(ValueError, match="parameter group"):
        AdamW8bit([nn.Parameter(torch.zeros(3))]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))]
)
def test_copies_go_on_as_the_original(duplicate):
    model = make_gpt()
    optimizer = AdamW8bit(model.parameters())
    trained(model, optimizer, 2)
    other, its_optimizer = duplicate((model, optimizer))
    assert all(map(torch.equal, trained(model, optimizer, 2), trained(other, its_optimizer, 2)))


def test_a_deleted_model_is_freed_with_its_optimizer():
    for make in (AdamW8bit, Lion, Apollo):
        model = make_gpt()
        optimizer = make(model.parameters())
        trained(model, optimizer, 1)
        ghost = weakref.ref(model)
        del model, optimizer
        assert ghost() is None


# --- As an optimizer of PyTorch -------------------------------------------------------------------


@pytest.mark.parametrize("make", [AdamW8bit, Lion, Apollo])
def test_groups_schedules_closures_and_frozen_parameters(make):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.requires_grad_(False)
    frozen = model[1].weight.detach().clone()
    optimizer = make(
        [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[1].parameters()}], lr=1e-3
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 64)).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(5):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < losses[0]
    assert torch.equal(model[1].weight, frozen)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 + math.cos(math.pi / 2)) / 2)


@pytest.mark.parametrize("make", [AdamW8bit, Lion, Apollo])
def test_a_gradient_that_is_nan_is_not_hidden(make):
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = make([parameter])
    parameter.grad = torch.ones(64, 64)
    parameter.grad[3, 5] = float("nan")
    for _ in range(2):
        optimizer.step()
    assert parameter[3, 5].isnan()


@pytest.mark.parametrize("make", [AdamW8bit, Lion, Apollo])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0 and finite, but it is -1.0"),
        ({"lr": float("nan")}, "lr must be at least 0 and finite, but it is nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers, at least 0 and below 1, but they are"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
    ],
)
def test_numbers_out_of_range_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(2))], **options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (AdamW8bit, {"block_size": 0}, "1 <= block_size <= slice_size must hold, but they are 0"),
        (AdamW8bit, {"slice_size": 100}, "but they are 256 and 100"),
        (AdamW8bit, {"eps": -1e-8}, "eps must be at least 0"),
        (Apollo, {"rank": 0}, "rank, interval and growth must be at least 1, but they are 0, 200"),
        (Apollo, {"growth": 0.9}, "growth must be at least 1"),
    ],
)
def test_their_own_numbers_out_of_range_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(2))], **options)


@pytest.mark.parametrize("make", [AdamW8bit, Lion, Apollo])
def test_sparse_gradients_and_complex_parameters_are_refused(make):
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients, but parameter 0 is torch.float32 and"):
        make(embedding.parameters()).step()
    number = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    number.grad = torch.ones_like(number)
    with pytest.raises(ValueError, match="real parameters with dense gradients, but parameter 0"):
        make([number]).step()


@pytest.mark.gpu
@pytest.mark.parametrize("make", [AdamW8bit, Lion, Apollo])
def test_on_a_gpu_the_update_is_close_to_that_of_the_cpu(make):
    weights = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = make_gpt()
        start = [parameter.detach().clone() for parameter in model.parameters()]
        model = model.to(device)
        # Apollo's random numbers are other ones on a GPU: at a rank above every matrix it is AdamW.
        optimizer = make(model.parameters(), **({"rank": 10**6} if make is Apollo else {}))
        for seed in range(3):
            tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(seed)).to(
                device
            )
            model(tokens, tokens.roll(-1, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights[device] = [parameter.detach().cpu() for parameter in model.parameters()]
    moved = sum((one - before).norm() for one, before in zip(weights["cpu"], start, strict=True))
    apart = sum(
        (one - two).norm() for one, two in zip(weights["cpu"], weights["cuda"], strict=True)
    )
    assert 0 < moved and apart < 0.2 * moved


@pytest.mark.gpu
def test_on_a_gpu_a_state_on_the_host_gives_the_same_weights_bit_for_bit():
    weights = []
    for zeros in (torch.zeros, far_zeros):
        model = make_gpt_of(0).cuda()
        optimizer = AdamW8bit(model.parameters(), slice_size=4096, zeros=zeros)
        for seed in range(3):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator("cuda").manual_seed(100 * seed + number)
                parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)
            optimizer.step()
        weights.append([parameter.detach() for parameter in model.parameters()])
    codes = optimizer.state[model.token_embedding.weight]["exp_avg"]
    assert codes.is_pinned() and codes.any()
    assert all(map(torch.equal, *weights))


@pytest.mark.gpu
@pytest.mark.parametrize("state_far", [False, True])
def test_weights_on_the_host_step_on_the_gpu_bit_for_bit_as_weights_on_the_gpu(state_far):
    weights = []
    for far in (False, True):
        model = make_gpt_of(0).cuda()
        homes = {}
        for number, parameter in enumerate(model.parameters()):
            if far and parameter.numel() >= 4096:
                parameter.data = far_like(parameter).copy_(parameter.detach())
            homes[number] = parameter.device
        zeros = far_zeros_of_cuda if state_far else torch.zeros
        optimizer = AdamW8bit(model.parameters(), slice_size=4096, zeros=zeros, device="cuda")
        for seed in range(3):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator("cuda").manual_seed(100 * seed + number)
                gradient = torch.randn(parameter.shape, device="cuda", generator=generator)
                parameter.grad = gradient.to(homes[number])
            optimizer.step()
        weights.append([parameter.detach().cuda() for parameter in model.parameters()])
        state = optimizer.state[model.token_embedding.weight]
        assert state["exp_avg"].is_pinned() == state_far and state["exp_avg"].any()
    assert model.token_embedding.weight.is_pinned()  # it has stayed where it was
    assert all(map(torch.equal, *weights))
    kept = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(kept)
    assert optimizer.state[model.token_embedding.weight]["exp_avg"].is_cuda != state_far


def far_zeros_of_cuda(*size, dtype=None, device=None):
    return far_zeros(*size, dtype=dtype, device="cuda")


def test_device_names_where_steps_are_computed_and_the_default_is_where_the_weights_are():
    weights = []
    for options in ({}, {"device": "cpu"}):
        torch.manual_seed(0)
        model = make_gpt()
        optimizer = AdamW8bit(model.parameters(), slice_size=4096, **options)
        for seed in range(2):
            tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(seed))
            model(tokens, tokens.roll(-1, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, *weights))
    assert copy.copy(optimizer).device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="device"):
        AdamW8bit(model.parameters(), device="nowhere")
