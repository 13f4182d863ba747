"""A run as a generator function and as a function that returns a step: the same to whoever asks."""

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from memlab import measure
from memlab.proof import first_step, gradient_difference, losses
from memlab.run import RESERVED, check_run, loss_of, start_run
from tests.helpers import training_step

WIDTH, BATCH = 64, 32
FLOAT = 4
WEIGHTS = (WIDTH * WIDTH + WIDTH) * FLOAT


def train(layers=2, rounds=5, optimizer=torch.optim.AdamW):
    """A plain loop."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
    optimizer = optimizer(model.parameters(), lr=1e-3)
    inputs = torch.randn(BATCH, WIDTH)
    for _ in range(rounds):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def build(layers=2):
    """The same in the older form."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = torch.randn(BATCH, WIDTH)

    return training_step(optimizer, lambda: model(inputs).square().mean())


def test_both_forms_measure_the_same():
    loop, older = measure(train, device="cpu"), measure(build, device="cpu")
    assert loop.losses == older.losses
    for column in ("parameters", "optimizer_state", "gradients", "batch"):
        assert loop.columns[column] == older.columns[column], column
    assert loop.columns["parameters"] == 2 * WEIGHTS
    assert loop.columns["batch"] == BATCH * WIDTH * FLOAT
    # A plain loop still holds the loss of the step before when the next one begins.
    assert 0 <= loop.peak_bytes - older.peak_bytes <= BATCH * WIDTH * FLOAT
    kinds = [phase.kind for phase in loop.ledger.phases]
    assert kinds == ["forward", "backward", "optimizer"] * 2
    assert kinds == [phase.kind for phase in older.ledger.phases]
    assert len(loop.bytes_after_step) == 2


@pytest.mark.parametrize("run", [train, build])
def test_options_are_passed_on(run):
    measured = measure(run, layers=3, device="cpu")
    assert measured.columns["parameters"] == 3 * WEIGHTS


def test_a_call_that_is_not_made_yet_is_a_run_too():
    for run in (functools.partial(train, layers=1), lambda: train(layers=1)):
        assert measure(run, device="cpu").columns["parameters"] == WEIGHTS


def test_proof_takes_both_forms():
    loop, older = first_step(train), first_step(build)
    assert gradient_difference(older, loop) == 0
    assert loop.loss == older.loss and loop.updated == older.updated
    assert losses(train, 3) == losses(build, 3)
    assert losses(train, 1, layers=1) == losses(build, 1, layers=1)


def test_what_building_computes_is_no_part_of_a_step():
    def tried_first(rounds=2):
        trial = nn.Linear(WIDTH, WIDTH)
        trial(torch.ones(BATCH, WIDTH))
        yield from train(rounds=rounds)

    assert first_step(tried_first).flops == first_step(train).flops
    # With one step only there is nothing to tell them apart by.
    assert first_step(tried_first, rounds=1).flops > first_step(train, rounds=1).flops


def test_a_run_without_a_model_is_measured():
    def add():
        total = torch.zeros(1000)
        for _ in range(2):
            total += torch.ones(1000)
            yield total.sum()

    # `ones` and `total`, and the sum of the step before.
    assert measure(add, device="cpu").known_bytes >= 2 * 1000 * FLOAT


# What is refused ----------------------------------------------------------------------------------


def nothing():
    yield from ()


def too_short():
    yield 1.0


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        (nothing, {}, "the run yielded nothing"),
        (too_short, {}, r"ended after 1 step, and one more was asked for.*\(steps=1\)"),
        (train(), {}, "the run was called already"),
        (train, {"gpu": "T4"}, "an option named 'gpu', which is memlab's own"),
        (lambda: None, {}, "it returned nothing"),
        (train, {"width": 3}, "cannot be called with these options.*'width'"),
        (None, {}, "build has to be a function"),
        (nn.Linear(1, 1), {}, "was given a model"),
    ],
)
def test_what_is_no_run(run, options, message):
    with pytest.raises(ValueError, match=message):
        measure(run, device="cpu", **options)
    assert measure(too_short, steps=1, device="cpu").losses == (1.0,)  # all is well afterwards


@pytest.mark.parametrize("name", RESERVED)
def test_an_option_with_a_name_of_ours_is_refused(name):
    scope = {}
    exec(f"def run({name}=1):\n    yield 1.0", scope)
    with pytest.raises(ValueError, match=f"an option named '{name}', which is memlab's own"):
        check_run(scope["run"])


def test_what_a_loop_raises_reaches_the_caller_and_nothing_is_held():
    held = []

    def fails():
        model = nn.Linear(WIDTH, WIDTH)
        held.append(weakref.ref(model))
        yield model(torch.ones(1, WIDTH)).sum()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        measure(fails, device="cpu")
    gc.collect()
    assert held[0]() is None


def test_what_a_loop_holds_is_freed_at_its_end():
    ended = []

    def loop():
        weights = torch.zeros(10_000)
        try:
            while True:
                yield weights.sum()
        finally:
            ended.append(True)

    measured = measure(loop, steps=3, device="cpu")
    assert ended == [True]
    assert all(block.died is not None for block in measured.ledger.blocks if block.bytes > 1000)


# The pieces ---------------------------------------------------------------------------------------


def test_steps_come_one_by_one():
    run = start_run(train, {"rounds": 2})
    assert run.builds_in_first_step
    first, second = loss_of(run.step()), loss_of(run.step())
    assert second < first
    run.close()
    assert not start_run(build).builds_in_first_step


@pytest.mark.parametrize(
    ("result", "loss"),
    [(torch.tensor([2.0]), 2.0), (3, 3.0), (True, None), (None, None), (torch.ones(2), None)],
)
def test_the_loss_of_a_step(result, loss):
    assert loss_of(result) == loss
