"""A rank is measured without the others, and a notebook's functions run on real ones."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

from memlab import exercises
from memlab.course import ranks
from memlab.techniques.sharding import RankError

WIDTH = 64


def train(change=None, rows=2):
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    change(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(dist.get_rank())
    inputs = torch.randn(rows, WIDTH)
    while True:
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


class Mean:
    """A class of the notebook, which a function of the notebook calls."""

    @staticmethod
    def of(gradient):
        return gradient / dist.get_world_size()


def average(parameter):
    dist.all_reduce(parameter.grad)
    parameter.grad = Mean.of(parameter.grad)


def replicate(model):
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(average)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part):
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        parts = list(gradient.chunk(dist.get_world_size()))
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts)
        return mine / len(parts)


def shard(model):
    slices = model.weight.detach().chunk(dist.get_world_size())
    model.weight = part = nn.Parameter(slices[dist.get_rank()].clone())
    model.forward = lambda x: nn.functional.linear(x, Gather.apply(part))


def forget_to_average(model):
    slices = model.weight.detach().chunk(dist.get_world_size())
    model.weight = nn.Parameter(slices[dist.get_rank()].clone())


def fail(model):
    raise ValueError("this model is not to be had")


def test_one_rank_holds_its_slice():
    whole = ranks.measure_one(train, 8, change=replicate, device="cpu")
    sharded = ranks.measure_one(train, 8, change=shard, device="cpu")
    assert whole.columns["optimizer_state"] >= 8 * WIDTH**2
    assert 8 * WIDTH**2 // 8 <= sharded.columns["optimizer_state"] <= 8 * WIDTH**2 // 8 + 64
    assert sharded.losses is None
    assert not dist.is_initialized()


@pytest.mark.slow
def test_real_ranks_train_the_same_whole_and_sharded():
    whole, sharded = ranks.losses(train, [replicate, shard], rows=3)
    assert len(whole) == 4
    assert whole == pytest.approx(sharded, rel=1e-5)
    assert whole[0] > whole[-1]


@pytest.mark.slow
def test_a_rank_that_fails_is_named_with_its_error():
    with pytest.raises(RankError, match="this model is not to be had"):
        ranks.losses(train, [fail])


LIMIT = 12 * WIDTH**2


def check(change, budget=LIMIT):
    options = {"run": train, "reference": replicate, "budget": budget}
    before = len(exercises.history)
    result = ranks.check(change, **options)
    assert exercises.history[before:] == [result]
    del exercises.history[before:]
    return result


def test_a_name_that_is_only_assigned_is_not_taken_along(monkeypatch):
    # A notebook's last output is its global `_`, and a widget cannot be sent to another process.
    monkeypatch.setitem(shard.__globals__, "_", threading.Lock())
    found = ranks._Found()
    found.add(Gather)
    assert "_" not in found.values and found.sources


def test_no_answer_and_one_that_is_too_large():
    assert "Not solved yet: " in str(check(None))
    over = check(replicate)
    assert not over.passed and "Over the budget" in str(over)


@pytest.mark.slow
def test_an_answer_has_to_train_the_same():
    right, wrong = check(shard), check(forget_to_average)
    assert right.passed and "Solved: " in str(right)
    assert not wrong.passed and "do not train the same model" in str(wrong)
