"""DistributedDataParallel's buckets are gradients, though no tensor of Python shows them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memlab import measure, watch
from memlab.ledger import BUCKET
from memlab.meters.reducers import bucket_bytes
from memlab.units import KiB

CPU = torch.device("cpu")
WIDTH, LAYERS, FLOAT = 64, 3, 4
GRADIENTS = LAYERS * (WIDTH * WIDTH + WIDTH) * FLOAT
#: What the ranks tell each other about the buckets: a few numbers, freed by whichever thread.
SLACK = 4 * KiB


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(as_view=False):
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    return DistributedDataParallel(model, gradient_as_bucket_view=as_view)


def steps(model, many):
    for _ in range(many):
        model(torch.randn(8, WIDTH)).square().mean().backward()
        model.zero_grad()
        yield


def training(as_view=False):
    yield from steps(wrapped(as_view), 9)


@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.usefixtures("one_rank")
def test_a_bucket_is_a_gradient_from_its_birth_on(as_view):
    init = DistributedDataParallel.__init__
    measured = measure(training, steps=4, as_view=as_view)
    expected = GRADIENTS if as_view else 2 * GRADIENTS
    assert expected <= measured.columns["gradients"] < expected + SLACK
    assert measured.columns["kept"] == 0
    # Those of the first step, and those that are made anew once the order is known.
    made = [block for block in measured.ledger.blocks if block.bytes == GRADIENTS]
    sent, *buckets = [(block.column, block.name) for block in made]
    assert sent == ("temporaries", "")  # the weights, when the wrapper is built
    assert buckets == [("gradients", BUCKET)] * 2
    assert DistributedDataParallel.__init__ is init


@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.usefixtures("one_rank")
def test_those_from_before_a_watch_are_counted_until_others_take_their_place(steps_before):
    model = wrapped()
    for _ in steps(model, steps_before):
        pass
    before = sum(bucket_bytes(CPU))
    assert before >= GRADIENTS
    with watch(model, every=1) as w:
        for _ in steps(model, 3):
            w.step()
    assert len(w.measurement.steps) == 3
    for step in w.measurement.steps:
        left = step.columns_after["gradients"] - (before - GRADIENTS)
        assert GRADIENTS <= left < GRADIENTS + SLACK


@pytest.mark.usefixtures("one_rank")
def test_between_two_stretches_of_a_watch_they_stay_gradients():
    model = wrapped()
    with watch(model, every=1_000) as w:
        for _ in steps(model, 70):
            w.step()
    recorded = [step for step in w.measurement.steps if step.columns_after]
    assert recorded[-1].number > 60
    assert len({step.columns_after["gradients"] // GRADIENTS for step in recorded}) == 1
    # Other tests have left something behind, and everything in the process counts.
    before = recorded[0].columns_after["kept"]
    assert recorded[-1].columns_after["kept"] - before < GRADIENTS
