"""Where backward adds gradients in place, a prediction has as many blocks as a measurement."""

import pytest
import torch
from torch import nn

from memlab import measure, predict

SIZE = 1000


def plain(x):
    return (x.sin() + x.cos() + x.tanh()).sum()


def held_by_a_hook(x):
    branch = x.sin()
    kept = []
    x.register_hook(kept.append)
    branch.register_hook(kept.append)
    return (branch + x + x.cos()).sum()


def twice_the_same(x):
    return (x * x).sum()


def expanded(x):
    return x.sum() + x.sin().sum()


def transposed(x):
    square = x[:900].view(30, 30)
    return (square.t() * 3).exp().sum() + square.exp().sum()


def of_rows(x):
    rows = torch.zeros(8, dtype=torch.long)
    return x[rows].sum() + x.gather(0, rows).sum() + x.index_select(0, rows).sum()


class Python(torch.autograd.Function):
    """Its sum stands in a line of Python, which makes a new tensor."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2 + gradient * 3


@pytest.mark.parametrize(
    "loss_of", [plain, held_by_a_hook, twice_the_same, expanded, transposed, of_rows, Python.apply]
)
def test_sums_of_gradients_make_as_many_blocks_as_they_really_do(loss_of):
    def train():
        weight = nn.Parameter(torch.ones(SIZE))
        scale = nn.Linear(1, 1)
        while True:
            loss = loss_of(weight * 2).sum() + scale(torch.ones(1)).sum()
            loss.backward()
            weight.grad = None
            yield loss

    sizes = []
    for found in (measure(train, device="cpu"), predict(train, device="cpu", progress=False)):
        blocks = [block for block in found.ledger.blocks if not block.scratch]
        sizes.append(sorted(block.bytes for block in blocks if block.bytes >= 900 * 4))
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) > 5
