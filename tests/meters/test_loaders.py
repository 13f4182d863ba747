"""What a data loader returns is the batch, whether or not a module is given it."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, dataloader

from memlab import budget, measure, watch
from memlab.meters.loaders import batches_shown

ROWS, WIDTH, TARGETS = 16, 256, 128
FLOAT = 4
BATCH = ROWS * (WIDTH + TARGETS) * FLOAT


class Pictures(Dataset):
    """Each row is made when it is asked for, so a batch is nobody's but the loader's."""

    def __len__(self):
        return 4 * ROWS

    def __getitem__(self, index):
        return torch.full((WIDTH,), float(index)), torch.full((TARGETS,), float(index))


def batches():
    return DataLoader(Pictures(), batch_size=ROWS)


def training():
    model = nn.Linear(WIDTH, TARGETS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in batches():
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def without_a_module():
    weight = torch.zeros(WIDTH, TARGETS, requires_grad=True)
    for inputs, targets in batches():
        loss = (inputs @ weight - targets).square().mean()
        loss.backward()
        yield loss
        weight.grad = None


def evaluations():
    model = nn.Linear(WIDTH, TARGETS)
    for _ in range(2):
        total = torch.zeros(())
        with torch.no_grad():
            for inputs, targets in batches():
                total += (model(inputs) - targets).square().mean()
        yield total


@pytest.mark.parametrize(
    ("run", "at_once"),
    # While the second batch of an evaluation is fetched, the loop's variables hold the first.
    [(training, 1), (without_a_module, 1), (evaluations, 2)],
)
def test_a_batch_is_a_batch_whoever_uses_it(run, at_once):
    columns = measure(run).columns
    assert columns["batch"] == at_once * BATCH
    assert columns["kept"] <= FLOAT  # the running total of the evaluation


def test_a_batch_that_no_module_is_given_is_a_batch():
    model = nn.Linear(WIDTH, TARGETS)
    with watch(model) as w:
        fetched = list(batches())
        model(fetched[0][0]).sum().backward()
    ledger = w.measurement.ledger
    made = [block for block in ledger.blocks if block.column == "batch"]
    assert sum(block.bytes for block in made) == 4 * BATCH
    assert [block.name for block in made].count("from a data loader") == 6


def test_an_iterator_from_before_is_heard_and_all_is_undone():
    fetch = dataloader._BaseDataLoaderIter.__next__
    iterator = iter(batches())
    next(iterator)
    heard = []
    first, second = batches_shown(heard.append), batches_shown(heard.append)
    first.__enter__()
    second.__enter__()
    inputs, _ = next(iterator)
    assert len(heard) == 2 and heard[0][0] is inputs
    # In the order in which they came, as a watch does inside a budget.
    first.__exit__(None, None, None)
    next(iterator)
    second.__exit__(None, None, None)
    next(iterator)
    assert len(heard) == 3
    assert dataloader._BaseDataLoaderIter.__next__ is fetch


def test_a_budget_knows_it_too():
    with budget("1 GiB") as limit:
        before = limit.columns()["batch"]
        fetched = next(iter(batches()))
        assert limit.columns()["batch"] - before == BATCH
    del fetched


def fetching_ahead():
    """As nanoGPT does: the next batch is made between forward and backward."""
    model = nn.Linear(WIDTH, TARGETS)
    inputs = torch.randn(ROWS, WIDTH)
    while True:
        loss = model(inputs).square().mean()
        inputs = torch.randn(ROWS, WIDTH)
        loss.backward()
        yield loss
        model.zero_grad()


def test_a_batch_that_is_fetched_before_the_backward_is_one():
    measured = measure(fetching_ahead, steps=4)
    assert measured.columns["batch"] == 2 * ROWS * WIDTH * FLOAT
    made = [block for block in measured.ledger.blocks if block.operator == "aten::randn"]
    # Nobody was given the last one.
    assert [block.column for block in made] == [*["batch"] * 4, "activations"]
