"""The first step of a run: gradients by name, floating-point operations, what it updates."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlab.first_step import first_step
from memlab.proof import gradient_difference, never_updated
from memlab.workloads import gpt
from tests.helpers import global_hooks

BATCH, INPUTS, OUTPUTS = 8, 16, 4


pytestmark = pytest.mark.usefixtures("objects_frozen")


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh(), nn.Linear(32, OUTPUTS))


def batch():
    return torch.randn(BATCH, INPUTS, generator=torch.Generator().manual_seed(1))


def build(
    make=two_layers,
    loss_of=lambda model, inputs: model(inputs).square().mean(),
    optimizer=torch.optim.SGD,
    after=None,
):
    """A run; `after(model, optimizer)` is what its step does after backward (by default it steps
    and zeroes).
    """

    def build_run():
        model, inputs = make(), batch()
        chosen = optimizer(model.parameters(), lr=0.1)

        def step():
            loss = loss_of(model, inputs)
            loss.backward()
            if after is None:
                chosen.step()
                chosen.zero_grad()
            else:
                after(model, chosen)
            return loss

        return step

    return build_run


def autograd_gradients():
    """What autograd gives for two_layers(), with no memlab in between."""
    model = two_layers()
    loss = model(batch()).square().mean()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), dict(
        zip([name for name, _ in model.named_parameters()], found, strict=True)
    )


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


# The gradients ------------------------------------------------------------------------------------


def test_gradients_are_autograds_by_name():
    loss, expected = autograd_gradients()
    step = first_step(build())
    assert_equal(step.gradients, expected)
    assert step.loss == loss
    assert step.updated == set(expected)
    assert gradient_difference(step, step) == 0.0


def test_an_optimizer_that_steps_inside_the_backward():
    def build_run():
        model, inputs = two_layers(), batch()
        optimizers = {
            parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()
        }
        for parameter, own in zip(optimizers, map(weakref.ref, optimizers.values()), strict=True):

            def update(parameter, own=own):
                own().step()
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(update)

        def step():
            assert optimizers  # held here, and weakly by the hooks
            model(inputs).square().mean().backward()

        return step

    step = first_step(build_run)
    assert_equal(step.gradients, autograd_gradients()[1])
    assert step.updated == set(step.gradients)
    assert step.loss is None


def test_no_optimizer():
    step = first_step(build(after=lambda model, optimizer: None))
    assert_equal(step.gradients, autograd_gradients()[1])
    assert step.updated == set()


def test_an_update_by_hand_is_an_update():
    @torch.no_grad()
    def by_hand(model, optimizer):
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
        model[0].bias.grad = None

    step = first_step(build(after=by_hand))
    assert step.updated == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert step.gradients.keys() == {"0.weight", "2.weight", "2.bias"}


def test_an_optimizer_with_a_learning_rate_of_zero_updates_nothing():
    def step_in_vain(model, optimizer):
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()

    assert first_step(build(after=step_in_vain)).updated == set()


def test_a_gradient_is_the_one_that_the_optimizer_saw():
    def spoil(model, optimizer):
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad.mul_(7)

    assert_equal(first_step(build(after=spoil)).gradients, autograd_gradients()[1])


def test_an_update_that_rounding_swallows_is_still_an_optimizers():
    def make():
        return two_layers().append(nn.LayerNorm(OUTPUTS, bias=False))

    def loss_of(model, inputs):
        return model(inputs).pow(4).mean()

    def small_steps(parameters, lr):
        return torch.optim.SGD(parameters, lr=1e-9)

    step = first_step(build(make, loss_of, small_steps))
    assert step.gradients["3.weight"].abs().max() > 0  # and 1 - 1e-9 is 1
    assert step.updated == {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight"}


def test_clipped_and_accumulated_gradients_are_as_the_optimizer_sees_them():
    def clipped(model, optimizer):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    norm = math.sqrt(
        sum(g.square().sum().item() for g in first_step(build(after=clipped)).gradients.values())
    )
    assert norm == pytest.approx(1e-3, rel=1e-3)

    def halves(model, inputs):
        (model(inputs[:4]).square().mean() / 2).backward()
        return model(inputs[4:]).square().mean() / 2

    whole, accumulated = first_step(build()), first_step(build(loss_of=halves))
    assert 0 < gradient_difference(whole, accumulated) < 1e-5


def test_tied_weights_are_one_gradient():
    def loss_of(model, inputs):
        tokens = torch.arange(32).reshape(2, 16)
        return model(tokens, tokens.roll(-1, 1))

    config = gpt.tiny(layers=1)
    step = first_step(build(lambda: gpt.GPT(config), loss_of, torch.optim.AdamW))
    assert "token_embedding.weight" in step.gradients and "head.weight" not in step.gradients
    assert len(step.gradients) == len(list(gpt.GPT(config).parameters()))
    assert step.loss == pytest.approx(math.log(256), abs=0.2)


def test_the_names_are_those_of_the_whole_model_when_its_parts_are_called():
    def in_parts(model, inputs):
        # No call of the whole model: each layer alone, and the second layer's names would be the
        # first one's.
        return model[2](model[1](model[0](inputs))).square().mean()

    assert_equal(first_step(build(loss_of=in_parts)).gradients, autograd_gradients()[1])


def test_two_models_side_by_side_keep_their_gradients_apart():
    def build_run():
        models, inputs = [two_layers(), nn.Sequential(nn.Linear(INPUTS, 3))], batch()
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]

        def step():
            for model, optimizer in zip(models, optimizers, strict=True):
                model(inputs).square().mean().backward()
                optimizer.step()

        return step

    gradients = first_step(build_run).gradients
    expected = autograd_gradients()[1]
    assert gradients.keys() == {*expected, "0.weight of model 2", "0.bias of model 2"}
    assert gradients["0.weight of model 2"].shape == (3, INPUTS)
    assert_equal({name: gradients[name] for name in expected}, expected)


def test_a_parameter_that_is_in_no_model():
    def build_run():
        model, scale = two_layers(), nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([scale, *model.parameters()], lr=0.1)

        def step():
            (scale * model(batch()).square().mean()).backward()
            optimizer.step()
            optimizer.step()  # a second step in one step is not a second parameter

        return step

    step = first_step(build_run)
    assert len(step.gradients) == 5
    assert step.gradients["parameter 4"].item() == pytest.approx(autograd_gradients()[0])
    assert "parameter 4" in step.updated


def test_sparse_gradients_and_lazy_layers():
    tokens = torch.tensor([1, 1, 3])

    def embed(sparse):
        def make():
            torch.manual_seed(0)
            return nn.Sequential(nn.Embedding(5, 2, sparse=sparse), nn.LazyLinear(2))

        return first_step(build(make, lambda model, inputs: model(tokens).square().mean()))

    sparse, dense = embed(True), embed(False)
    assert len(sparse.gradients) == 3
    assert gradient_difference(dense, sparse) == 0.0


@pytest.mark.filterwarnings(
    "ignore:Using `torch.compile"
)  # with hooks on all modules, which is what first_step has
def test_a_wrapper_around_the_model_is_seen_through():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = two_layers()

        def forward(self, inputs):
            return self.inner(inputs)

    plain = first_step(build())
    wrapped = first_step(build(Wrapper))
    compiled = first_step(build(lambda: torch.compile(two_layers(), backend="eager")))
    assert "inner.0.weight" in wrapped.gradients and "_orig_mod.0.weight" in compiled.gradients
    for other in (wrapped, compiled):
        assert gradient_difference(plain, other) == gradient_difference(other, plain) == 0.0
        assert never_updated(plain, other) == never_updated(other, plain) == []


# What is asked of two runs ------------------------------------------------------------------------


def test_missing_gradients_of_a_real_run():
    def frozen():
        model = two_layers()
        model[2].requires_grad_(False)
        return model

    reference, half = first_step(build()), first_step(build(frozen))
    assert half.gradients.keys() == {"0.weight", "0.bias"}
    with pytest.raises(ValueError, match=r"no gradient reached 2 of 4 parameters \(2.bias\)"):
        gradient_difference(reference, half)
    assert never_updated(reference, half) == ["2.bias", "2.weight"]
    assert never_updated(half, reference) == []


# Floating-point operations ------------------------------------------------------------------------


def test_flops_are_the_hand_count_of_a_linear_layer():
    step = first_step(build(lambda: nn.Linear(INPUTS, OUTPUTS)))
    # Forward, and the weight's gradient. The inputs need none. Two operations for each
    # multiply-and-add.
    assert step.flops == 2 * (2 * BATCH * INPUTS * OUTPUTS)
    two = first_step(build())
    first, second = 2 * BATCH * INPUTS * 32, 2 * BATCH * 32 * OUTPUTS
    assert two.flops == 2 * first + 3 * second


def test_a_checkpointed_model_computes_more_and_its_gradients_are_equal():
    def checkpointed(model, inputs):
        hidden = model[0](inputs)
        return checkpoint(
            lambda x: model[2](model[1](x)).square(), hidden, use_reentrant=False
        ).mean()

    plain, again = first_step(build()), first_step(build(loss_of=checkpointed))
    assert gradient_difference(plain, again) == 0.0
    assert again.flops == plain.flops + 2 * BATCH * 32 * OUTPUTS


@pytest.mark.parametrize("key_heads", [4, 2])
def test_fused_attention_is_counted_like_its_products(key_heads):
    """Also where several heads of queries share one of keys, and on the CPU, whose kernel PyTorch's
    counter leaves out.
    """
    b, h, n, d = 2, 4, 8, 16

    def build_attention():
        q = torch.randn(b, h, n, d, requires_grad=True)
        k, v = (torch.randn(b, key_heads, n, d, requires_grad=True) for _ in range(2))

        def step():
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=key_heads != h
            )
            out.sum().backward()

        return step

    product = 2 * b * h * n * n * d
    # Forward two. Backward recomputes the scores, and has four products of its own.
    assert first_step(build_attention).flops == 2 * product + 5 * product


# Nothing stays ------------------------------------------------------------------------------------


def switched_on():
    return (
        global_hooks(),
        torch._C._len_torch_dispatch_stack(),
    )


def test_nothing_stays_switched_on():
    def fails():
        model = two_layers()

        def step():
            model(batch())
            raise KeyError("mine")

        return step

    def fails_to_build():
        raise KeyError("mine")

    before = switched_on()
    first_step(build())
    for run in (fails, fails_to_build):
        with pytest.raises(KeyError, match="mine"):
            first_step(run)
    assert switched_on() == before
