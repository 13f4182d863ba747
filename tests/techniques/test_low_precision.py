"""Low precision: which bytes halve, rounding that is right in the mean, optimizers that lose no
small update, and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from memlab import measure, proof
from memlab.techniques.low_precision import (
    MasterWeightAdamW,
    StochasticRoundingAdamW,
    cast_to_low_precision,
    from_float8,
    stochastic_round,
    to_float8,
)
from memlab.workloads import gpt, vit
from tests.helpers import a_resnet, a_unet, a_whisper, small_llama, training_step

BOTH = [StochasticRoundingAdamW, MasterWeightAdamW]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def small_gpt():
    return gpt.GPT(gpt.GPTConfig(64, 16, layers=2, heads=2, hidden=32))


def small_vit():
    return vit.ViT(vit.ViTConfig(8, 4, channels=1, classes=10, layers=2, heads=2, hidden=32))


def llama():
    return small_llama(use_cache=False)


def loss_of(model):
    """One loss of each of the three models, in the model's own dtype, on the same data
    each time.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (4, 17), generator=generator)
    if isinstance(model, gpt.GPT):
        return model(tokens[:, :-1], tokens[:, 1:])
    if isinstance(model, vit.ViT):
        images = torch.randn(4, 1, 8, 8, generator=generator).to(next(model.parameters()).dtype)
        return model(images, tokens[:, 0] % 10)
    return model(input_ids=tokens, labels=tokens).loss


def neighbours(x):
    """The BF16 numbers below and above an FP32 number, found without the code under test."""
    below = (x.view(torch.int32) & (-1 << 16)).view(FP32)  # towards zero
    above = (below.view(torch.int32) + (1 << 16)).view(FP32)
    return below, above


# --- Casting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("make", [small_gpt, small_vit, llama])
def test_every_parameter_takes_two_bytes_and_is_the_same_object(make, dtype):
    model = make()
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    assert cast_to_low_precision(model, dtype) is None
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert sum(p.nbytes for p in after.values()) == 2 * sum(v.numel() for v in values.values())
    assert all(torch.equal(after[name], value.to(dtype)) for name, value in values.items())


@pytest.mark.parametrize("make", [small_gpt, small_vit, llama])
def test_gradients_are_those_of_the_model_to_16_bits(make):
    """Over 20 seeds the norm of the difference was at most 2.0 % of the gradients' norm."""
    model = make()
    loss_of(model).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    cast_to_low_precision(model)
    loss_of(model).backward()
    assert {p.grad.dtype for p in model.parameters()} == {BF16}
    low = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    assert 0 < (low - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("make", [a_whisper, a_resnet, a_unet])
def test_a_model_of_sounds_or_images_casts_its_inputs(make):
    model, run = make()
    exact = run()
    cast_to_low_precision(model)
    loss = run()
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.1)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {BF16}


class Given(nn.Module):
    """A model that returns the inputs that it was given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, *args, **kwargs):
        return args, kwargs


def test_which_inputs_are_cast():
    model = Given()
    cast_to_low_precision(model, FP16)
    rows, times = torch.ones(3, 2), torch.full((3,), 999.0)
    tokens = torch.ones(3, 2, dtype=torch.int64)
    (cast, left, listed), named = model(rows, times, [rows.double()], mask={"a": rows}, ids=tokens)
    assert cast.dtype == listed[0].dtype == named["mask"]["a"].dtype == FP16
    assert left is times and named["ids"] is tokens
    cast_to_low_precision(model, BF16)  # another type is that of the weights
    assert model(rows)[0][0].dtype == BF16
    assert pickle.loads(pickle.dumps(model))(rows)[0][0].dtype == BF16
    assert model.float()(rows)[0][0] is rows


def test_inputs_are_the_callers_if_it_is_said():
    model = Given()
    cast_to_low_precision(model, cast_inputs=False)
    rows = torch.ones(3, 2)
    assert model(rows)[0][0] is rows


def test_shared_parameters_stay_shared_and_integers_stay():
    model = small_gpt()
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("mean", torch.ones(3))
    cast_to_low_precision(model)
    assert model.head.weight is model.token_embedding.weight
    assert model.count.dtype == torch.int64 and model.mean.dtype == BF16


@pytest.mark.parametrize("name", ["token_embedding.weight", "head.weight"])
def test_a_shared_parameter_is_kept_by_any_of_its_names(name):
    model = small_gpt()
    cast_to_low_precision(model, keep=[name])
    assert model.head.weight.dtype == FP32 and model.blocks[0].mlp.expansion.weight.dtype == BF16


def test_a_rotary_embedding_keeps_its_frequencies():
    model, cast = llama(), llama()
    exact = model.model.rotary_emb.inv_freq.clone()
    cast_to_low_precision(model, keep="inv_freq")
    cast_to_low_precision(cast)
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert not torch.equal(cast.model.rotary_emb.inv_freq.float(), exact)
    assert loss_of(model).isfinite()


def test_a_model_without_memory_can_be_cast():
    with torch.device("meta"):
        model = small_gpt()
    cast_to_low_precision(model)
    assert {p.dtype for p in model.parameters()} == {BF16}


def with_gradient(model):
    loss_of(model).backward()


def complex_parameter(model):
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))


def large_weight(model):
    model.final_norm.weight.data[0] = 1e5


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"dtype": FP32}, "must be torch.bfloat16 or torch.float16, but it is torch.float32"),
        (None, {"keep": "inv_freq"}, "keep names inv_freq, but GPT has no such parameter or"),
        (None, {"keep": ["blocks"]}, "keep names blocks"),
        (with_gradient, {}, "token_embedding.weight has a gradient: call zero_grad"),
        (complex_parameter, {}, "phase is complex"),
        (large_weight, {"dtype": FP16}, "final_norm.weight holds a number above 6.55e\\+04"),
    ],
)
def test_what_cannot_be_cast_is_refused_and_nothing_is_changed(change, arguments, message):
    model = small_gpt()
    if change:
        change(model)
    dtypes = [p.dtype for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        cast_to_low_precision(model, **arguments)
    assert [p.dtype for p in model.parameters()] == dtypes


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        cast_to_low_precision([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="Identity has no floating-point parameters"):
        cast_to_low_precision(nn.Identity())


def test_casting_needs_one_tensor_twice_and_looking_for_large_numbers_no_more_than_slices():
    small, large = 2**10, 5 * 2**20  # numbers: the large one has five slices

    def build():
        model = nn.ParameterList([torch.ones(large), torch.ones(small)])
        cast_to_low_precision(model)
        return lambda: model[1].sum().item()

    run = measure(build, device="cpu", steps=1)
    assert run.known_bytes == 4 * large + 2 * large + 4 * small


def test_a_number_that_is_too_large_is_found_in_the_last_slice_and_where_rows_are_not_contiguous():
    for weight in (torch.ones(2**20 + 3), torch.ones(2**10, 2**10 + 1).T):
        model = nn.ParameterDict({"weight": weight})
        model["weight"].data[-1] = 1e5
        with pytest.raises(ValueError, match="weight holds a number above"):
            cast_to_low_precision(model, FP16)
        assert model["weight"].dtype == FP32


def test_infinite_weights_are_not_mistaken_for_large_ones():
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = float("-inf")
    cast_to_low_precision(layer, FP16)
    assert layer.weight[0, 0] == float("-inf")


# --- Stochastic rounding --------------------------------------------------------------------------


def test_rounding_goes_to_one_of_the_two_neighbours():
    x = torch.randn(20_000) * 10.0 ** torch.randint(-30, 30, (20_000,))
    rounded = stochastic_round(x).float()
    below, above = neighbours(x)
    assert ((rounded == below) | (rounded == above)).all()
    assert (rounded == below).any() and (rounded == above).any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.03125, 0.25, 0.5, 0.9375])
def test_the_mean_of_many_roundings_is_the_number(sign, share):
    """Five standard deviations of the mean of n roundings, each a coin that shows heads with this
    share.
    """
    n = 200_000
    x = sign * (1.5 + share / 128)
    rounded = stochastic_round(torch.full((n,), x))
    up = (rounded.float().abs() > 1.5).double().mean().item()
    assert abs(up - share) < 5 * (share * (1 - share) / n) ** 0.5
    # Rounding to the nearest is wrong by a part of the spacing, whatever n is.
    assert rounded.double().mean().item() == pytest.approx(x, abs=5 / 128 * 0.5 / n**0.5)


def test_numbers_that_are_bf16_already_stay():
    x = torch.randn(5000).bfloat16().float()
    special = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), 2.0**-133, torch.finfo(BF16).max]
    )
    for exact in (x, special):
        assert torch.equal(stochastic_round(exact).float(), exact)
    assert stochastic_round(torch.tensor([-0.0])).signbit().item()


def test_nans_stay_nans_whatever_their_bits():
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001]).to(
        torch.int32
    )  # -1 is a NaN, too
    assert stochastic_round(bits.view(FP32).repeat(1000)).isnan().all()


def test_the_generator_decides_and_the_input_is_left_alone():
    x = torch.randn(7, 11).t()  # not contiguous
    before = x.clone()
    one, two, other = (
        stochastic_round(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(x, before) and one.shape == x.shape and one.dtype == BF16
    assert stochastic_round(torch.empty(0, 3)).shape == (0, 3)


def test_only_fp32_is_rounded():
    for x, name in ((torch.ones(2, dtype=FP16), "torch.float16"), (1.0, "float")):
        with pytest.raises(TypeError, match=f"must be an FP32 tensor, but it is {name}"):
            stochastic_round(x)


# --- The optimizers -------------------------------------------------------------------------------


def gradients_like(parameter, steps):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(parameter.shape, generator=generator).bfloat16() for _ in range(steps)]


def trained(parameter, optimizer, steps=20):
    for gradient in gradients_like(parameter, steps):
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def start(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


SETTINGS = {"lr": 3e-4, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("slice_size", [1, 7, 2**20])
def test_the_master_copy_is_trained_as_by_torch_bit_for_bit(slice_size):
    exact = nn.Parameter(start(5, 9).float())
    trained(exact, torch.optim.AdamW([exact], foreach=False, **SETTINGS))
    low = nn.Parameter(start(5, 9))
    optimizer = MasterWeightAdamW([low], slice_size=slice_size, **SETTINGS)
    trained(low, optimizer)
    assert torch.equal(optimizer.state[low]["master"], exact)
    assert torch.equal(low, exact.bfloat16())


@pytest.mark.parametrize("make", BOTH)
def test_fp32_parameters_are_stepped_as_by_torch(make):
    exact, ours = nn.Parameter(start(5, 9).float()), nn.Parameter(start(5, 9).float())
    trained(exact, torch.optim.AdamW([exact], foreach=False, **SETTINGS))
    optimizer = make([ours], slice_size=7, **SETTINGS)
    trained(ours, optimizer)
    assert torch.equal(ours, exact) and "master" not in optimizer.state[ours]


def test_the_stochastic_steps_are_right_in_the_mean_where_the_nearest_stand_still():
    copies, numbers = 1000, 40
    exact = nn.Parameter(start(numbers).float())
    trained(exact, torch.optim.AdamW([exact], lr=1e-5, weight_decay=0.0, foreach=False))
    many = nn.Parameter(start(numbers).repeat(copies, 1))
    optimizer = StochasticRoundingAdamW([many], lr=1e-5, weight_decay=0.0)
    for gradient in gradients_like(exact, 20):
        many.grad = gradient.expand(copies, numbers).contiguous()
        optimizer.step()
    nearest = nn.Parameter(start(numbers))
    trained(nearest, torch.optim.AdamW([nearest], lr=1e-5, weight_decay=0.0, foreach=False))

    wanted = exact.detach() - start(numbers).float()
    got = many.detach().float() - start(numbers).float()
    error = got.mean(0) - wanted
    deviation = got.std(0) / copies**0.5
    # The moments are BF16, so the update itself is about 1 % off; the rest is chance.
    assert (error.abs() < 5 * deviation + 0.02 * wanted.abs()).all()
    assert (got.mean(0) @ wanted) / (wanted @ wanted) == pytest.approx(1, abs=0.1)
    assert torch.equal(nearest, start(numbers))  # not one weight moved


def test_the_second_moment_follows_and_with_rounding_to_the_nearest_it_does_not():
    def moment(optimizer, parameter):
        parameter.grad = torch.ones_like(parameter)
        for _ in range(1000):
            optimizer.step()
        return optimizer.state[parameter]["exp_avg_sq"].float().mean().item()

    ours, theirs = (nn.Parameter(torch.ones(200, dtype=BF16)) for _ in range(2))
    expected = 1 - 0.999**1000
    assert moment(StochasticRoundingAdamW([ours], lr=0.0), ours) == pytest.approx(
        expected, rel=0.02
    )
    assert moment(torch.optim.AdamW([theirs], lr=0.0, foreach=False), theirs) < 0.85 * expected


@pytest.mark.parametrize(("make", "state"), [(StochasticRoundingAdamW, 4), (MasterWeightAdamW, 12)])
@pytest.mark.parametrize("model", [small_gpt, small_vit, llama])
def test_state_takes_four_or_twelve_bytes_a_parameter(model, make, state):
    model = model()
    cast_to_low_precision(model)
    optimizer = make(model.parameters())
    loss_of(model).backward()
    optimizer.step()
    tensors = [
        v
        for entry in optimizer.state.values()
        for v in entry.values()
        if isinstance(v, torch.Tensor)
    ]
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(tensor.nbytes for tensor in tensors) == state * parameters
    dtypes = {BF16} if make is StochasticRoundingAdamW else {FP32}
    assert {tensor.dtype for tensor in tensors} == dtypes


@pytest.mark.parametrize(
    ("make", "state", "a_number"), [(StochasticRoundingAdamW, 4, 20), (MasterWeightAdamW, 12, 8)]
)
@pytest.mark.parametrize("slice_size", [2**20, 1024])
def test_the_peak_of_a_step_is_what_the_docstring_says(make, state, a_number, slice_size):
    """Counted by hand: weights and gradients 2 + 2, the state, and so many bytes a number of a
    slice.
    """
    rows, columns = 64, 128

    def build():
        parameter = nn.Parameter(start(rows, columns))
        optimizer = make([parameter], slice_size=slice_size)

        def step():
            parameter.grad = torch.zeros(rows, columns, dtype=BF16)
            optimizer.step()
            optimizer.zero_grad()

        return step

    n = rows * columns
    expected = (2 + 2 + state) * n + a_number * min(n, slice_size)
    measured = measure(build, steps=3, device="cpu").known_bytes
    # Python numbers that meet a tensor become tensors for a moment.
    assert 0 <= measured - expected <= 64


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("make", "state", "a_number"), [(StochasticRoundingAdamW, 4, 20), (MasterWeightAdamW, 12, 8)]
)
def test_the_peak_of_a_step_on_a_gpu(make, state, a_number):
    n = 2**22

    def build():
        parameter = nn.Parameter(torch.zeros(n, dtype=BF16, device="cuda"))
        optimizer = make([parameter], slice_size=2**20)

        def step():
            parameter.grad = torch.zeros(n, dtype=BF16, device="cuda")
            optimizer.step()
            optimizer.zero_grad()

        return step

    expected = (2 + 2 + state) * n + a_number * 2**20
    assert measure(build, steps=3, device="cuda").known_bytes == pytest.approx(expected, rel=0.02)


@pytest.mark.gpu
def test_rounding_on_a_gpu_is_right_in_the_mean_and_generators_decide():
    x = torch.full((100_000,), 1 + 0.25 / 128, device="cuda")
    up = (stochastic_round(x) > 1).double().mean().item()
    assert up == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 100_000) ** 0.5)
    one, two = (stochastic_round(x, torch.Generator("cuda").manual_seed(0)) for _ in range(2))
    assert torch.equal(one, two)


def training(make, low):
    def build():
        torch.manual_seed(0)
        model = small_gpt()
        if low:
            cast_to_low_precision(model)
        optimizer = make(model.parameters(), lr=3e-3)

        return training_step(optimizer, lambda: loss_of(model))

    return build


@pytest.mark.parametrize("make", BOTH)
def test_a_gpt_trains_as_in_fp32(make):
    exact = proof.losses(training(torch.optim.AdamW, False), 40)
    low = proof.losses(training(make, True), 40)
    assert exact[-1] < exact[0] - 1
    assert sum(low[-5:]) == pytest.approx(sum(exact[-5:]), rel=0.05)


@pytest.mark.parametrize("make", BOTH)
def test_weights_that_are_not_contiguous_are_stepped_alike(make):
    convolution = nn.Conv2d(3, 4, 3).to(BF16)
    parameters = [convolution.weight, nn.Parameter(start(6, 5).t()), nn.Parameter(start(1)[0])]
    twins = [nn.Parameter(p.detach().contiguous().clone()) for p in parameters]
    convolution.to(memory_format=torch.channels_last)
    assert not convolution.weight.is_contiguous()
    master, twin = (make(ps, lr=0.1) for ps in (parameters, twins))
    for p, q in zip(parameters, twins, strict=True):
        q.grad = torch.ones_like(q)
        p.grad = torch.ones_like(p)
    master.step()
    twin.step()
    spacing = 2.0**-6  # stochastic rounding may differ by one BF16 number, of up to 4
    allowed = 0 if make is MasterWeightAdamW else spacing
    for p, q in zip(parameters, twins, strict=True):
        assert (p.float() - q.float()).abs().max() <= allowed


@pytest.mark.parametrize("make", BOTH)
def test_a_run_that_is_saved_and_loaded_goes_on_as_if_nothing_had_happened(make):
    def run(optimizer, parameter, first, last):
        for iteration, gradient in enumerate(gradients_like(parameter, last)):
            if iteration >= first:
                parameter.grad = gradient
                torch.manual_seed(iteration)
                optimizer.step()
        return parameter.detach().clone()

    whole = nn.Parameter(start(6, 5))
    expected = run(make([whole], lr=1e-4), whole, 0, 20)

    half = nn.Parameter(start(6, 5))
    optimizer = make([half], lr=1e-4)
    run(optimizer, half, 0, 10)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    loaded = nn.Parameter(half.detach().clone())
    other = make([loaded], lr=1.0)
    other.load_state_dict(saved)
    assert torch.equal(run(other, loaded, 10, 20), expected)
    for name, value in optimizer.state[half].items():
        if isinstance(value, torch.Tensor):
            assert other.state[loaded][name].dtype == value.dtype
            assert (
                other.state[loaded][name].data_ptr() != saved["state"][0][name].data_ptr()
                or value.dtype == BF16
            )


def test_a_state_without_the_fp32_copy_is_refused():
    parameter = nn.Parameter(start(3))
    other = StochasticRoundingAdamW([parameter])
    trained(parameter, other, 1)
    optimizer = MasterWeightAdamW([parameter])
    with pytest.raises(ValueError, match="no FP32 copy of the weights"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("make", BOTH)
def test_a_copy_of_the_optimizer_can_step(make):
    parameter = nn.Parameter(start(3))
    optimizer = make([parameter])
    trained(parameter, optimizer, 1)
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.ones(3, dtype=BF16)
    twin.step()
    assert twin.state[twin.param_groups[0]["params"][0]]["step"] == 2
    assert optimizer.state[parameter]["step"] == 1


def test_replicas_with_equal_generators_stay_equal():
    one, two = (nn.Parameter(start(50)) for _ in range(2))
    for parameter in (one, two):
        trained(
            parameter,
            StochasticRoundingAdamW([parameter], generator=torch.Generator().manual_seed(5)),
        )
    assert torch.equal(one, two)


@pytest.mark.parametrize("make", BOTH)
def test_groups_schedulers_closures_and_missing_gradients_work_as_in_any_optimizer(make):
    still, moving, frozen = (nn.Parameter(torch.ones(4, dtype=BF16)) for _ in range(3))
    optimizer = make([{"params": [still], "lr": 0.0}], lr=0.25, weight_decay=0.0)
    optimizer.add_param_group({"params": [moving, frozen]})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        loss = (still + moving).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 8
    scheduler.step()
    assert torch.equal(still, torch.ones(4)) and torch.equal(frozen, torch.ones(4))
    # Adam's first step is the learning rate; one half of it in the second.
    assert moving.tolist() == [0.75] * 4
    optimizer.step()
    assert moving.float().mean().item() == pytest.approx(0.625, abs=0.005)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more, but it is -1.0"),
        ({"lr": float("nan")}, "lr must be 0 or more, but it is nan"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers from 0 to below 1"),
        ({"eps": -1e-8}, "eps must be 0 or more"),
        ({"weight_decay": float("inf")}, "weight_decay must be 0 or more"),
        ({"slice_size": 0}, "slice_size must be a positive int, but it is 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(start(3))], **settings)


@pytest.mark.parametrize("make", BOTH)
def test_fp16_and_sparse_gradients_are_refused(make):
    with pytest.raises(ValueError, match="Parameters must be BF16 .* but one is torch.float16"):
        make([nn.Parameter(torch.ones(3, dtype=FP16))])
    table = nn.Embedding(4, 3, sparse=True, dtype=BF16)
    first = nn.Parameter(start(3))
    first.grad = torch.ones(3, dtype=BF16)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="A gradient is sparse"):
        make([first, table.weight]).step()
    assert torch.equal(first, start(3))  # nobody was stepped


# --- FP8 storage ----------------------------------------------------------------------------------

# Half the spacing of 4 (3) significant bits, over the number's largest value in its binade.
FORMATS = [(torch.float8_e4m3fn, 2**-4), (torch.float8_e5m2, 2**-3)]


@pytest.mark.parametrize("x_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("dtype", "error"), FORMATS)
def test_fp8_takes_one_byte_a_number_and_four_a_row(x_dtype, dtype, error):
    x = (torch.randn(50, 64) * 10.0 ** torch.empty(50, 1).uniform_(-3, 3)).to(x_dtype)
    values, scale = to_float8(x, dtype)
    assert values.nbytes + scale.nbytes == 50 * 64 + 4 * 50
    assert values.dtype == dtype and values.shape == x.shape and scale.shape == (50, 1)
    back, exact = from_float8(values, scale, FP32), x.float()
    largest = exact.abs().amax(-1, keepdim=True)
    near = exact.abs() > 2**-10 * largest  # the rest may become zero
    assert ((back - exact).abs() <= error * exact.abs())[near].all()
    assert ((back - exact).abs() > error / 4 * exact.abs())[near].any()
    assert torch.equal(from_float8(values, scale), back.bfloat16())  # exact in BF16, too


def test_the_scale_is_a_power_of_two_and_rounds_nothing():
    x = torch.tensor([[3.5, -448.0, 0.25], [1.75 * 2**20, 2.0**20, 0.0]])
    values, scale = to_float8(x)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((2, 1), 0.5))
    assert torch.equal(from_float8(values, scale, FP32), x)
    assert (values.float().abs().amax(-1) > 223).all()


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in FORMATS])
def test_the_ends_of_the_range(dtype):
    x = torch.tensor([[2.0**127, -(2.0**127)], [0.0, 0.0], [1e-38, 0.0]])
    back = from_float8(*to_float8(x, dtype), FP32)
    assert back.isfinite().all() and torch.equal(back[1], x[1])
    assert torch.allclose(back, x, rtol=0.13)
    for bad in (float("inf"), float("-inf"), float("nan")):
        assert (
            from_float8(*to_float8(torch.tensor([[1.0, bad], [1.0, 2.0]]), dtype))[0].isnan().all()
        )
        assert from_float8(*to_float8(torch.tensor([[1.0, bad], [1.0, 2.0]]), dtype))[
            1
        ].tolist() == [1, 2]


def test_shapes():
    for shape in ((3,), (2, 3, 4), (0, 3), (3, 0)):
        values, scale = to_float8(torch.randn(shape))
        assert scale.shape == (*shape[:-1], 1) and from_float8(values, scale).shape == shape
    x = torch.randn(4, 6, 5).transpose(0, 1)
    assert torch.equal(from_float8(*to_float8(x)), from_float8(*to_float8(x.contiguous())))


def test_saved_activations_in_fp8_give_close_gradients():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).to(BF16)
    x = torch.randn(64, 32).bfloat16()

    def pack(saved):
        return saved if isinstance(saved, nn.Parameter) else to_float8(saved)

    def unpack(packed):
        return from_float8(*packed) if isinstance(packed, tuple) else packed

    def gradients():
        layers.zero_grad()
        layers(x).float().square().mean().backward()
        return torch.cat([p.grad.float().flatten() for p in layers.parameters()])

    exact = gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        stored = gradients()
    assert 0 < (stored - exact).norm() / exact.norm() < 0.05


def test_what_cannot_be_stored_or_returned_is_refused():
    with pytest.raises(ValueError, match="dtype must be torch.float8_e4m3fn or torch.float8_e5m2"):
        to_float8(torch.ones(3), BF16)
    for x, given in (
        (torch.arange(3), "torch.int64"),
        (torch.tensor(1.0), "torch.float32 \\(\\)"),
        (1.0, "float"),
    ):
        with pytest.raises(TypeError, match=f"with an axis of rows, but it is {given}"):
            to_float8(x)
    values, scale = to_float8(torch.ones(3))
    with pytest.raises(TypeError, match="what to_float8 returned, but they are torch.float32"):
        from_float8(torch.ones(3), scale)
    with pytest.raises(ValueError, match="dtype must be torch.bfloat16 or torch.float32"):
        from_float8(values, scale, FP16)
