"""The proof beside the saving: how far gradients are apart, and the losses."""

import math

import pytest
import torch
from torch import nn

from memlab.proof import FirstStep, gradient_difference, losses
from tests.helpers import training_step


def of(flops=0, **gradients):
    return FirstStep(None, {name: torch.tensor(value) for name, value in gradients.items()}, flops)


def test_the_difference_is_relative_to_each_parameters_largest_gradient():
    reference = of(a=[1.0, -4.0], b=[0.5, 0.0])
    assert gradient_difference(reference, of(a=[1.0, -4.0], b=[0.5, 0.0])) == 0.0
    assert gradient_difference(reference, of(a=[2.0, -4.0], b=[0.5, 0.0])) == 0.25
    assert gradient_difference(reference, of(a=[1.0, -4.0], b=[0.5, 0.5])) == pytest.approx(1.0)
    # More parameters than the reference's are no difference; a gradient of zeros is compared as it
    # is.
    assert gradient_difference(of(a=[0.0]), of(a=[0.5], b=[7.0])) == 0.5
    assert gradient_difference(of(a=[1.0], b=[]), of(a=[1.0], b=[])) == 0.0


def test_a_small_gradient_is_held_against_a_thousandth_of_the_largest():
    def with_small(value):
        return of(a=[-4.0], small=[value])

    # Rounding of a zero: of another sign, and still no difference to speak of.
    assert gradient_difference(with_small(1e-11), with_small(-1e-11)) == pytest.approx(5e-9)
    # At the thousandth nothing changes; below it, twice too large is found all the same.
    assert gradient_difference(with_small(4e-3), with_small(8e-3)) == pytest.approx(1.0)
    assert gradient_difference(with_small(4e-5), with_small(8e-5)) == pytest.approx(0.01)
    assert gradient_difference(with_small(4e-5), with_small(0.0)) == pytest.approx(0.01)
    # One that should be zero and is not.
    assert gradient_difference(with_small(0.0), with_small(0.04)) == pytest.approx(10.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_no_number_is_the_worst_there_is(bad):
    good = of(a=[1.0, 2.0], b=[1.0, 1.0])
    for first, second in (
        (good, of(a=[bad, 2.0], b=[1.0, 1.0])),
        (of(a=[bad, 2.0], b=[1.0, 1.0]), good),
    ):
        assert gradient_difference(first, second) == math.inf
    assert gradient_difference(of(a=[bad]), of(a=[bad])) == math.inf
    assert gradient_difference(of(a=[0.0]), of(a=[bad])) == math.inf


def test_runs_that_cannot_be_compared_are_refused():
    one = of(a=[1.0], b=[1.0])
    with pytest.raises(
        ValueError, match="the reference computed no gradient: does its step call backward"
    ):
        gradient_difference(of(), one)
    with pytest.raises(ValueError, match=r"no gradient reached 1 of 2 parameters \(b\)"):
        gradient_difference(one, of(a=[1.0]))
    with pytest.raises(ValueError, match=r"no gradient reached 2 of 2 parameters \(a\)"):
        gradient_difference(one, of())
    with pytest.raises(ValueError, match=r"gradient of a has shape \(2,\), not \(1,\)"):
        gradient_difference(one, of(a=[1.0, 1.0], b=[1.0]))


# Losses ---------------------------------------------------------------------------------


def build():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.ones(3, 4)

    return training_step(optimizer, lambda: model(inputs).square().mean())


def test_losses_are_those_of_a_plain_loop():
    step = build()
    expected = [step().item() for _ in range(4)]
    assert losses(build, 4) == expected
    assert expected[-1] < expected[0]
    assert losses(lambda: lambda: 2, 2) == [2.0, 2.0]
    with pytest.raises(ValueError, match="returns no loss"):
        losses(lambda: lambda: None, 1)
