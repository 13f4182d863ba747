"""Each storage of a run on fake tensors is noted, with its end."""

import gc

import torch

from memlab.meters.fake import FakeMode, Shapes


def record(run):
    made, notes = [], []
    shapes = Shapes(notes.append, lambda device, event: made.append((device, event)), {}, {})
    with FakeMode(), shapes:
        result = run()
    del result
    gc.collect()
    return made, notes, shapes


def test_a_storage_is_noted_once_and_its_end():
    def run():
        numbers = torch.empty(100, device="cuda")
        view = numbers.view(10, 10).t()
        return view + 1

    made, notes, _ = record(run)
    assert [(device, event.size) for device, event in made] == [
        ("cuda", 400),
        ("cuda", 400),
        ("cuda", -400),
        ("cuda", -400),
    ]
    assert [event.time for _, event in made] == sorted({event.time for _, event in made})
    assert made[0][1].dtype == "float32" and made[0][1].shape == (100,)
    assert notes == []


def test_host_and_gpu_are_told_apart():
    made, _, _ = record(lambda: torch.zeros(8).to("cuda"))
    assert [(device, event.size) for device, event in made] == [
        ("cpu", 32),
        ("cuda", 32),
        ("cpu", -32),
        ("cuda", -32),
    ]


def test_values_that_are_asked_for_are_assumed_and_noted():
    answers = []

    def run():
        loss = torch.randn(4, device="cuda").sum()
        answers.append(loss.item())
        answers.append(bool(torch.isnan(loss).any()))
        answers.append(bool(torch.isfinite(loss).all()))
        answers.append(torch.equal(loss, loss + 1))

    _, notes, _ = record(run)
    assert answers == [1.0, False, True, True]
    assert notes == [
        "a value that the run asks for (`.item()`): taken as 1",
        "torch.equal() of two tensors without values: taken as equal",
    ]


def test_a_scaled_gradient_is_finite():
    def run():
        parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
        parameter.grad = torch.ones(3, device="cuda")
        infinite = torch.full((1,), 0.0, device="cuda")
        scale = torch.ones(1, device="cuda")
        torch._amp_foreach_non_finite_check_and_unscale_([parameter.grad], infinite, scale)
        assert infinite.item() == 0.0

    assert record(run)[1] == []


def test_progress_is_told():
    told = []

    def run():
        shapes.on_progress = told.append
        tensor = torch.ones(1)
        for _ in range(1000):
            tensor = tensor + 1

    shapes = Shapes(lambda note: None, lambda device, event: None, {}, {})
    with FakeMode(), shapes:
        run()
    assert told == [1000]
