"""The recipe's loop: each line alone, each rung, everything without one line."""

import pytest
import torch

from memlab import proof, recipe
from memlab.workloads import gpt

LINES = tuple(recipe.LADDER)
SMALL = gpt.GPTConfig(vocabulary_size=512, context_length=32, layers=2, heads=2, hidden=128)


@pytest.fixture(scope="module")
def setting():
    return recipe.Setting(config=SMALL, batch_size=3, sequence_length=32)


@pytest.fixture(scope="module")
def naive(setting):
    return proof.first_step(recipe.training(setting=setting))


def check(setting, naive, lines):
    """The gradients of the first step are the naive loop's, or as far off as 16 bits make them; and
    it goes on learning.
    """
    run = recipe.training(*lines, setting=setting)
    difference = proof.gradient_difference(naive, proof.first_step(run))
    assert difference < (0.1 if {"BF16 autocast", "BF16 weights"} & set(lines) else 2e-5), lines

    losses = proof.losses(run, 4)
    assert losses[-1] < losses[0], lines


@pytest.mark.parametrize("line", LINES)
def test_a_line_alone(setting, naive, line):
    check(setting, naive, [line])


@pytest.mark.parametrize("number", range(2, len(LINES) + 1))
def test_a_rung(setting, naive, number):
    check(setting, naive, LINES[:number])


@pytest.mark.parametrize("line", LINES)
def test_everything_without_one_line(setting, naive, line):
    # The embedding can only be far when the loss in tiles is there.
    gone = {line, "embedding far"} if line == "tied, in tiles" else {line}
    check(setting, naive, [name for name in LINES if name not in gone])


def test_larger_pieces_give_the_same_gradients(naive):
    larger = recipe.Setting(
        config=SMALL,
        batch_size=3,
        sequence_length=32,
        micro_batch_size=2,
        tile_words=256,
        slice_size=2**17,
    )
    check(larger, naive, LINES)


def test_the_order_of_the_names_does_not_matter(setting):
    forth = proof.losses(recipe.training(*LINES, setting=setting), 1)
    back = proof.losses(recipe.training(*reversed(LINES), setting=setting), 1)
    assert forth == back


def test_the_optimizer_can_be_another(setting):
    def sgd(on, setting, parameters):
        return torch.optim.SGD(parameters, lr=0.0)

    run = recipe.training(setting=setting, optimizer_of=sgd)
    assert proof.first_step(run).updated == set()
