"""The largest value that fits, over predictions of tiny runs."""

import pytest
import torch

from memlab import predict, solve
from memlab.units import KiB, MiB

CONTEXT = 516 * MiB  # of a GPU that is a size alone


def train(batch=1, width=1024):
    weight = torch.nn.Parameter(torch.zeros(width, width, device="cuda"))
    while True:
        loss = (torch.zeros(batch, width, width, device="cuda") + weight).sum()
        loss.backward()
        weight.grad = None
        yield loss


def shrinking(micro_batches=1):
    yield torch.zeros(64 * MiB // micro_batches, device="cuda", requires_grad=True).sum()


def found(run=train, gpu="640 MiB", **arguments):
    return solve(run, gpu=gpu, progress=False, steps=1, **arguments)


def needed(batch):
    return predict(train, steps=1, progress=False, gpu="640 MiB", batch=batch).fits().needed_bytes


@pytest.mark.parametrize("high", [None, 100])
def test_the_largest_batch_fits_and_one_more_does_not(high):
    solution = found(high=high)
    fits = {tried.value: bool(tried.fit) for tried in solution.tried}
    assert solution and fits[solution.value] and not fits[solution.value + 1]
    assert needed(solution.value) <= 640 * MiB < needed(solution.value + 1)
    assert solution.prediction.fits()
    assert len(solution.tried) <= 8  # a straight line needs few
    assert f"batch={solution.value} is the largest that fits" in str(solution)
    assert "<table" in solution._repr_html_()


def test_what_others_hold_is_less_for_the_run():
    assert found(in_use="32 MiB").value < found().value


def test_where_high_fits_it_is_the_answer():
    solution = found(high=3)
    assert solution.value == 3 and [tried.value for tried in solution.tried] == [1, 3]


def test_a_search_that_is_not_stopped_by_the_gpu_says_where_it_ended(monkeypatch):
    monkeypatch.setitem(solve.__globals__, "BOUND", 6)
    solution = found(low=2)
    assert solution.value == 6 and [tried.value for tried in solution.tried] == [2, 4, 6]
    assert "Nothing above batch=6 was tried" in str(solution)


def test_nothing_that_fits_is_said_with_what_it_needs():
    solution = found(gpu="520 MiB")
    assert not solution and solution.value is None
    assert "not even batch=1 fits" in str(solution)
    assert solution.prediction.process_bytes > CONTEXT + 4 * MiB


def test_a_need_that_falls_is_noticed():
    solution = found(shrinking, field="micro_batches", high=8)
    assert solution.value == 8
    assert "micro_batches=1 does not fit, and the larger micro_batches=8 does" in str(solution)
    solution = found(shrinking, field="micro_batches", low=4, high=8)
    assert "so a larger value may fit, too" in str(solution)


def test_an_error_of_the_run_says_which_value_was_tried():
    def fails(batch=1):
        assert batch < 4, "too many"
        yield torch.zeros(KiB, device="cuda", requires_grad=True).sum()

    with pytest.raises(AssertionError, match="too many") as caught:
        found(fails)
    assert caught.value.__notes__ == ["solve() tried batch=4."]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"field": "size"}, "no option 'size'. It has: batch, width"),
        ({"field": 3}, "name of one of the run's options"),
        ({"batch": 3}, "batch=3 was given, and batch is what is searched for"),
        ({"low": 1.5}, "low has to be a whole number, not 1.5"),
        ({"low": -5}, "low has to be at least 0, not -5"),
        ({"low": True}, "low has to be a whole number, not True"),
        ({"high": "many"}, "high has to be a whole number, not 'many'"),
        ({"low": 9, "high": 3}, "at most high, and they are 9 and 3"),
        ({"low": 2**21}, "without a high the search ends at 1,048,576"),
        ({"gpu": "RTX 4099"}, "no GPU is known as 'RTX 4099'"),
        ({"in_use": "much"}, "'much' is not a size"),
        ({"depth": 3}, "unexpected keyword argument 'depth'"),
        ({"run": train()}, "was called already"),
        ({"run": 3}, "has to be a function"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        found(**arguments)
