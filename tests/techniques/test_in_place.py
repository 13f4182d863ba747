"""In-place operations: an AdamW that is AdamW to the bit and allocates nothing, and activations
that are in place only where output and gradients stay what they were."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

from memlab import measure
from memlab.techniques.in_place import InPlaceAdamW, apply_in_place_activations
from memlab.workloads import gpt, vit
from tests.helpers import equal, small_gpt2

SMALL_GPT = gpt.tiny(layers=2, tied_embeddings=False)


# --- The optimizer --------------------------------------------------------------------------------


def gpt_run():
    model = gpt.GPT(SMALL_GPT)
    tokens = torch.randint(256, (2, 16))
    return model, lambda: model(tokens, tokens)


def vit_run():
    model = vit.ViT(vit.small(layers=1, hidden=32, heads=2))
    images, labels = torch.randn(2, 1, 32, 32), torch.tensor([1, 2])
    return model, lambda: model(images, labels)


def hugging_face_run():
    model = small_gpt2(vocab_size=50, n_positions=8, n_layer=1)
    tokens = torch.randint(50, (2, 8))
    return model, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss


@pytest.mark.parametrize("make", [gpt_run, vit_run, hugging_face_run])
def test_weights_and_moments_are_those_of_adamw_to_the_bit(make):
    def train(optimizer_class, **options):
        torch.manual_seed(0)
        model, loss = make()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = optimizer_class(
            model.parameters(), lr=3e-3, betas=(0.8, 0.95), weight_decay=0.1, **options
        )
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        after = [parameter.detach() for parameter in model.parameters()]
        assert not any(map(torch.equal, before, after))
        return after, [value for state in optimizer.state.values() for value in state.values()]

    weights, state = train(torch.optim.AdamW, foreach=False)
    assert len(state) == 3 * len(weights)
    ours, our_state = train(InPlaceAdamW)
    assert equal(ours, weights) and equal(our_state, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_those_of_adamw_too(dtype):
    def train(make):
        weight = nn.Parameter(torch.linspace(-1, 1, 50).to(dtype))
        optimizer = make([weight])
        for _ in range(3):
            weight.grad = weight.detach() ** 2
            optimizer.step()
        return weight.detach()

    assert torch.equal(
        train(InPlaceAdamW), train(lambda weights: torch.optim.AdamW(weights, foreach=False))
    )


def step_extra(optimizer_class, **options):
    """The most bytes at once that a step needs beside what is there already, and the
    model's sizes.
    """
    sizes = []

    def build():
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(n, 32)) for n in (40, 10, 60, 30)]
        sizes[:] = [weight.numel() for weight in weights]
        optimizer = optimizer_class(weights, **options)

        def step():
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
            for weight in weights:
                weight.grad = None

        return step

    measured = measure(build, device="cpu")
    return measured.known_bytes - 16 * sum(sizes) - 4 * len(sizes), sizes


def test_a_step_holds_a_copy_of_the_model_or_of_two_matrices_or_nothing():
    scalars = 64  # Python numbers that meet a tensor are tensors for a moment
    extra, sizes = step_extra(torch.optim.AdamW, foreach=True)
    assert 0 <= extra - 4 * sum(sizes) < scalars
    extra, sizes = step_extra(torch.optim.AdamW, foreach=False)
    assert (
        0
        <= extra - max(8 * n + 4 * before for before, n in zip([0, *sizes], sizes, strict=False))
        < scalars
    )
    extra, sizes = step_extra(InPlaceAdamW)
    assert 0 <= extra < scalars


def test_a_gradient_is_used_up_and_nobody_can_add_to_it():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = InPlaceAdamW([used, unused])
    used.sum().backward()
    optimizer.step()
    assert used.grad is None and unused not in optimizer.state
    assert torch.equal(unused, torch.ones(3)) and not torch.equal(used, torch.ones(3))


def test_state_is_exchanged_with_adamw_both_ways():
    def make(optimizer_class, **options):
        weight = nn.Parameter(torch.linspace(-1, 1, 20))
        return weight, optimizer_class([weight], **options)

    def step(weight, optimizer):
        weight.grad = weight.detach().cos()
        optimizer.step()

    first, theirs = make(torch.optim.AdamW, foreach=False)
    second, ours = make(InPlaceAdamW)
    step(first, theirs)
    step(second, ours)
    assert theirs.state_dict()["state"].keys() == ours.state_dict()["state"].keys()
    for source, target_class, options in (
        (theirs, InPlaceAdamW, {}),
        (ours, torch.optim.AdamW, {"foreach": False}),
    ):
        weight, target = make(target_class, **options)
        weight.data.copy_(first)
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        step(weight, target)
        twin = nn.Parameter(first.detach().clone())
        reference = torch.optim.AdamW([twin], foreach=False)
        reference.load_state_dict(copy.deepcopy(theirs.state_dict()))
        step(twin, reference)
        assert torch.equal(weight, twin)


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    weight = nn.Parameter(torch.ones(3))
    optimizer = InPlaceAdamW([weight])

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0 and (weight < 1).all()


def test_gradients_that_cannot_be_written_over_are_refused_before_anything_changes():
    def refuse(gradients, message, **group):
        weights = [nn.Parameter(torch.ones(2, 3)) for _ in gradients]
        optimizer = InPlaceAdamW(weights)
        optimizer.param_groups[0].update(group)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert (
            all(torch.equal(weight, torch.ones(2, 3)) for weight in weights) and not optimizer.state
        )

    shared = torch.ones(2, 3)
    refuse([shared, shared], r"of shape \(2, 3\) shares its memory")
    refuse([torch.ones(2, 3), torch.ones(1).expand(2, 3)], "shares its memory")
    refuse([torch.ones(2, 3).to_sparse()], "torch.sparse_coo")
    for option in ("amsgrad", "maximize"):
        refuse([torch.ones(2, 3)], "use torch.optim.AdamW", **{option: True})


def test_a_deleted_optimizer_is_freed_at_once():
    weight = nn.Parameter(torch.ones(3))
    optimizer = InPlaceAdamW([weight])
    weight.sum().backward()
    optimizer.step()
    ghost = weakref.ref(weight)
    del optimizer, weight
    assert ghost() is None


# --- Activations: bytes ---------------------------------------------------------------------------

ROWS, WIDTH = 32, 16


def chain(make):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH), make(), nn.Linear(WIDTH, 4))


@pytest.mark.parametrize(
    ("make", "less"),
    [
        (nn.ReLU, 0),
        (nn.LeakyReLU, 1),
        (nn.ELU, 1),
        (nn.CELU, 1),
        (nn.SELU, 1),
        (nn.ReLU6, 0),
        (nn.SiLU, 0),
        (nn.Hardswish, 0),
        (nn.Mish, 0),
    ],
)
def test_what_is_saved_less_is_one_tensor_or_none(make, less):
    """LeakyReLU and the ELUs save their input beside their output, which the next layer saves; in
    place only that.
    """
    (verdict,) = apply_in_place_activations(chain(make), torch.randn(ROWS, 4)).verdicts
    assert verdict.in_place and verdict.saved_bytes == less * 4 * ROWS * WIDTH
    assert ("saves 2,048 bytes" if less else "a temporary at most") in verdict.reason


def three_leaky_relus(example_rows):
    """A run that tries its activations with so many rows while it builds; 0: not at all."""
    torch.manual_seed(0)
    layers = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.LeakyReLU(0.1))]
    model = nn.Sequential(*layers, nn.Linear(64, 1))
    x = torch.randn(256, 64)
    if example_rows:
        assert len(apply_in_place_activations(model, x[:example_rows]).names) == 3
    while True:
        model.zero_grad()
        loss = model(x).mean()
        loss.backward()
        yield loss


def test_the_trial_costs_memory_while_it_runs_and_nothing_of_it_stays():
    small, large = (
        measure(three_leaky_relus, device="cpu", example_rows=rows) for rows in (2, 256)
    )
    assert large.bytes_after_step == small.bytes_after_step
    # The steps' own peak is there with the small example; with the large one the trial's is above.
    assert small.phase == "backward" and large.known_bytes > small.known_bytes


def test_the_ledger_sees_the_bytes_that_the_verdicts_count():
    beside, over = (measure(three_leaky_relus, device="cpu", example_rows=rows) for rows in (0, 2))
    unit = 4 * 256 * 64
    assert beside.losses == over.losses
    assert beside.columns["activations"] - over.columns["activations"] == 3 * unit
    # The peak falls by less: with one tensor for two owners, backward finds a gradient's room a
    # layer later.
    assert beside.known_bytes - over.known_bytes >= 2 * unit


def test_a_small_slice_of_a_large_tensor_is_an_example_and_is_copied_alone():
    data = torch.randn(100_000, 4)

    def build():
        model = chain(nn.ReLU)
        return lambda: apply_in_place_activations(model, data[:2])

    assert measure(build, steps=1, device="cpu").known_bytes < data.nbytes / 10


# --- Activations: right and wrong -----------------------------------------------------------------


class PreActivation(nn.Module):
    """`first` writes over what the sum reads afterwards: wrong, and autograd does not notice."""

    def __init__(self, make, width=8):
        super().__init__()
        self.first, self.second = make(), make()
        self.narrow, self.wide = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        h = self.narrow(self.first(x))
        return x + self.wide(self.second(self.norm(h)))


def residual_net(make=nn.LeakyReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), PreActivation(make), PreActivation(make))


IMAGES = torch.linspace(-1, 1, 2 * 64).sin().reshape(2, 1, 8, 8)


def gradients(model, *inputs):
    model.zero_grad()
    model(*inputs).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("make", [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU])
def test_what_is_wrong_without_an_error_is_refused_and_the_rest_is_right(make):
    expected = gradients(residual_net(make), IMAGES)
    naive = residual_net(make)
    for block in naive[1:]:
        block.first.inplace = True
    assert not all(
        torch.allclose(a, b, rtol=0.1)
        for a, b in zip(gradients(naive, IMAGES), expected, strict=True)
    )

    model = residual_net(make)
    handle = apply_in_place_activations(model, IMAGES)
    assert handle.names == ["1.second", "2.second"]
    wrong = [verdict.reason for verdict in handle.verdicts if not verdict.in_place]
    assert (
        all(reason.startswith("wrong without an error: output 0 changes by") for reason in wrong)
        and len(wrong) == 2
    )
    largest = max(gradient.abs().max() for gradient in expected)
    for given, right in zip(gradients(model, IMAGES), expected, strict=True):
        assert (given - right).abs().max() <= (2e-6 * largest if make is nn.ELU else 0)


def test_what_autograd_has_saved_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LeakyReLU(0.1))
    tanh, leaky = apply_in_place_activations(model, torch.randn(6, 4)).verdicts
    assert (tanh.in_place, tanh.reason) == (False, "has no in-place form")
    assert (leaky.in_place, leaky.reason) == (False, "autograd needs what it overwrites")
    assert not model[2].inplace


def test_the_caller_s_batch_is_not_written_over():
    x = torch.randn(6, 4)
    before = x.clone()
    handle = apply_in_place_activations(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), x)
    assert handle.names == [] and "input 0 changes" in handle.verdicts[0].reason
    assert torch.equal(x, before)


def test_a_view_that_autograd_protects_is_refused_with_its_words():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.activation = nn.Linear(4, 8), nn.ReLU()

        def forward(self, x):
            one, other = self.linear(x).chunk(2, dim=-1)
            return self.activation(one) + other

    (verdict,) = apply_in_place_activations(Halves(), torch.randn(6, 4)).verdicts
    assert not verdict.in_place and verdict.reason.startswith(
        "autograd refuses it: Output 0 of Split"
    )


def test_a_switch_that_is_on_and_wrong_is_turned_off_and_put_back_by_remove():
    model = residual_net()
    model[1].first.inplace = True
    expected = gradients(residual_net(), IMAGES)
    handle = apply_in_place_activations(model, IMAGES)
    assert not model[1].first.inplace and model[1].second.inplace
    assert equal(gradients(model, IMAGES), expected)
    handle.remove()
    handle.remove()
    assert model[1].first.inplace and not model[1].second.inplace


def test_what_changes_nothing_is_not_known():
    """A dropout in eval(), a ReLU of positive numbers, a module that does not run: nothing was seen
    of them.
    """

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout, self.relu, self.idle = (
                nn.Linear(4, 4),
                nn.Dropout(0.5),
                nn.ReLU(),
                nn.ReLU(),
            )

        def forward(self, x):
            return self.relu(self.dropout(self.linear(x)).exp() + 1)

    model = Model().eval()
    handle = apply_in_place_activations(model, torch.randn(6, 4))
    assert [verdict.name for verdict in handle.verdicts] == ["dropout", "relu", "idle"]
    assert handle.names == [] and all(
        "nothing is known" in verdict.reason for verdict in handle.verdicts
    )
    assert apply_in_place_activations(model.train(), torch.randn(6, 4)).names == ["dropout"]


# --- Activations: real models ---------------------------------------------------------------------


def test_a_gpt_and_a_vit_have_nothing_but_their_dropout():
    for model, example in (
        (gpt.GPT(gpt.tiny(layers=2, dropout=0.1)), torch.arange(16)[None]),
        (vit.ViT(vit.small(layers=1, hidden=32, heads=2, dropout=0.1)), torch.randn(1, 1, 32, 32)),
    ):
        expected = None
        for _ in range(2):  # as it is, and with what the helper found
            torch.manual_seed(0)
            model.zero_grad()
            model(example).square().mean().backward()
            given = [parameter.grad for parameter in model.parameters()]
            expected = expected or given
            handle = apply_in_place_activations(model, example)
        assert equal(given, expected)
        kinds = {verdict.kind: verdict for verdict in handle.verdicts}
        assert kinds["GELU"].reason == "has no in-place form"
        assert {verdict.kind for verdict in handle.verdicts if verdict.in_place} == {"Dropout"}
        assert not any(verdict.saved_bytes for verdict in handle.verdicts)


def test_a_hugging_face_codec_keeps_its_residual_branches():
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(
        num_filters=4,
        upsampling_ratios=[2],
        hidden_size=8,
        num_lstm_layers=1,
        codebook_size=8,
        codebook_dim=8,
        sampling_rate=8000,
        target_bandwidths=[1.5],
    )
    parts = transformers.EncodecModel(config)
    model, sound = nn.Sequential(parts.encoder, parts.decoder), torch.randn(1, 1, 64)
    expected = gradients(model, sound)
    handle = apply_in_place_activations(model, sound)
    refused = [verdict.name for verdict in handle.verdicts if not verdict.in_place]
    assert refused and all(
        name.endswith("block.0") for name in refused
    )  # the first ELU of each residual block
    assert all(verdict.saved_bytes > 0 for verdict in handle.verdicts if verdict.in_place)
    largest = max(gradient.abs().max() for gradient in expected)
    given = gradients(model, sound)
    assert all((a - b).abs().max() < 1e-5 * largest for a, b in zip(given, expected, strict=True))


# --- The trial leaves no trace --------------------------------------------------------------------


def test_weights_gradients_buffers_and_random_numbers_stay_as_they_are():
    model = nn.Sequential(residual_net(), nn.Dropout(0.5))
    state, expected = copy.deepcopy(model.state_dict()), gradients(model, IMAGES)
    model.load_state_dict(state)
    held = [gradient.clone() for gradient in expected]
    torch.manual_seed(5)
    apply_in_place_activations(model, IMAGES)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert equal(list(model.state_dict().values()), list(state.values()))
    assert equal([parameter.grad for parameter in model.parameters()], held)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0][1].second.inplace and not twin[0][1].first.inplace


def test_inputs_by_name_and_in_containers_and_under_no_grad():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.activation = nn.Linear(4, 4), nn.LeakyReLU()

        def forward(self, pair, *, mask, factor=1.0):
            y = self.activation(self.linear(pair[0])) * mask
            return {"rest": [y * factor, None], "mask": mask}

    x = torch.randn(6, 4, requires_grad=True) * 2  # not a leaf
    with torch.no_grad():
        handle = apply_in_place_activations(
            Model(), (x, 3), mask=torch.ones(6, 4).bool(), factor=2.0
        )
    assert handle.names == ["activation"]


def test_a_deleted_model_is_freed_at_once():
    model = chain(nn.LeakyReLU)
    ghost = weakref.ref(model[1])
    handle = apply_in_place_activations(model, torch.randn(2, 4))
    del model
    assert ghost() is None
    handle.remove()


def test_bad_input_is_refused_and_the_switches_are_put_back():
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        apply_in_place_activations(torch.relu, torch.randn(2))
    model = chain(nn.LeakyReLU)
    model[1].inplace = True
    with pytest.raises(
        RuntimeError, match="shapes cannot be multiplied"
    ):  # the model's own error, as it is
        apply_in_place_activations(model, torch.randn(2, 5))
    with pytest.raises(ValueError, match="has no gradient. Are all parameters frozen"):
        apply_in_place_activations(model.requires_grad_(False), torch.randn(2, 4))
    assert model[1].inplace
    with pytest.raises(ValueError, match="Two runs of this model as it is differ"):
        apply_in_place_activations(chain(nn.ReLU), torch.full((2, 4), float("nan")))

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 4), 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x) * self.calls

    with pytest.raises(ValueError, match="Two runs of this model as it is differ"):
        apply_in_place_activations(Counting(), torch.randn(2, 4))


def test_the_table_names_each_activation_once():
    lines = repr(apply_in_place_activations(residual_net(), IMAGES)).splitlines()
    assert lines[0] == "2 of 4 activations in place" and len(lines) == 5
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["1.first", "LeakyReLU", "no"],
        ["1.second", "LeakyReLU", "yes"],
    ]
    assert (
        repr(apply_in_place_activations(nn.Linear(2, 2), torch.ones(1, 2)))
        == "0 of 0 activations in place"
    )


@pytest.mark.gpu
def test_on_a_gpu_the_weights_are_adamw_s_and_a_step_needs_no_copy():
    def train(make):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(1024, 1024, device="cuda")) for _ in range(4)]
        optimizer = make(weights)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step()
        return torch.cuda.max_memory_allocated() - before, [weight.detach() for weight in weights]

    extra, ours = train(InPlaceAdamW)
    foreach_extra, _ = train(lambda weights: torch.optim.AdamW(weights, foreach=True))
    _, theirs = train(lambda weights: torch.optim.AdamW(weights, foreach=False))
    assert equal(ours, theirs)
    assert extra < 2**20 and foreach_extra >= 4 * 2**22


@pytest.mark.gpu
def test_on_a_gpu_the_same_activations_are_right():
    model = residual_net().cuda()
    assert apply_in_place_activations(model, IMAGES.cuda()).names == ["1.second", "2.second"]
