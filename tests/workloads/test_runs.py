import functools
from itertools import islice

import pytest
import torch

from memlab import measure, proof
from memlab.workloads import gpt, images, runs, text, vit

SMALL = gpt.GPTConfig(vocabulary_size=256, context_length=16, layers=1, heads=2, hidden=16)
DIGITS = vit.ViTConfig(
    image_size=8, patch_size=4, channels=1, classes=10, layers=1, heads=2, hidden=16
)


@pytest.fixture(scope="module")
def train():
    """Each run, small, by its name."""
    return {
        "gpt": functools.partial(runs.train_gpt, config=SMALL, batch_size=2, sequence_length=16),
        "vit": functools.partial(runs.train_vit, images.load(8).train, config=DIGITS, batch_size=4),
        "mlp": functools.partial(runs.train_mlp, 8, rows=4),
    }


@pytest.mark.parametrize("name", ["gpt", "vit", "mlp"])
def test_it_learns_and_the_seed_gives_its_weights(train, name):
    losses = proof.losses(train[name], 5)
    assert losses[-1] < losses[0]
    assert losses == proof.losses(train[name], 5)
    assert losses[0] != proof.losses(functools.partial(train[name], seed=1), 1)[0]


@pytest.mark.parametrize("name", ["gpt", "vit", "mlp"])
def test_what_is_applied_comes_before_the_optimizer_and_in_order(train, name):
    done = []

    def sgd(parameters, lr):
        done.append(lr)
        return torch.optim.SGD(parameters, lr=lr)

    changes = [lambda model: done.append("first"), lambda model: done.append("second")]
    next(train[name](apply=changes, make_optimizer=sgd, learning_rate=0.5))
    assert done == ["first", "second", 0.5]


def test_it_is_the_loop_that_anyone_writes():
    torch.manual_seed(0)
    model = gpt.GPT(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    expected = []
    for number in range(7, 10):
        tokens, targets = text.batch(text.load("prose").train, 2, 16, seed=number)
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())

    run = runs.train_gpt(
        config=SMALL,
        batch_size=2,
        sequence_length=16,
        learning_rate=0.01,
        first_batch=7,
        same_batch=False,
    )
    assert [loss.item() for loss in islice(run, 3)] == expected


def test_a_run_keeps_nothing_from_step_to_step(train):
    run = measure(train["gpt"], steps=4)
    assert run.bytes_after_step[1] == run.bytes_after_step[3]
    assert run.columns["batch"] == 2 * 8 * 2 * 16


def test_the_sizes_are_those_of_the_scale(monkeypatch):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    run = measure(runs.train_gpt, steps=1, repeats=0)
    assert run.columns["batch"] == 2 * 8 * 8 * 256
