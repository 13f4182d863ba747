"""Counting steps: where one ends, and what shapes it was given."""

import pytest
import torch
from torch import nn

from memlab import measure, predict, watch
from memlab.meters.live import tensors_in
from memlab.meters.steps import StepCounter


def network():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh())


def train(model, optimizer, rows, micro_batches=1):
    for count in rows:
        for _ in range(micro_batches):
            model(torch.randn(count, 8)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def shapes_of(counter):
    return [step.shapes for step in counter.counted]


def test_a_step_ends_when_a_module_is_called_after_the_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StepCounter() as counter:
        train(model, optimizer, [4, 2, 3])
        assert len(counter.counted) == 2
        counter.end_last_step()
        counter.end_last_step()
    assert [step.number for step in counter.counted] == [1, 2, 3]
    assert shapes_of(counter) == [((4, 8),), ((2, 8),), ((3, 8),)]
    for before, after in zip(counter.counted, counter.counted[1:], strict=False):
        assert before.start < before.end <= after.start


def test_micro_batches_are_one_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StepCounter() as counter:
        train(model, optimizer, [4, 2], micro_batches=3)
        counter.end_last_step()
    assert shapes_of(counter) == [((4, 8),) * 3, ((2, 8),) * 3]


def test_with_two_optimizers_the_first_one_counts():
    model, other = network(), network()
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    with StepCounter() as counter:
        for _ in range(3):
            train(model, first, [4])
            train(other, second, [4])
        counter.end_last_step()
    assert len(counter.counted) == 3


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_compiled_step_ends_a_step(micro_batches):
    """No hook of the optimizer runs in it."""
    model = network()
    model.insert(0, nn.Linear(8, 8).requires_grad_(False))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    with StepCounter() as counter:
        for count in (4, 2, 3):
            for _ in range(micro_batches):
                model(torch.randn(count, 8)).mean().backward()
            step()
            optimizer.zero_grad()
        counter.end_last_step()
        counter.end_last_step()
    assert shapes_of(counter) == [((rows, 8),) * micro_batches for rows in (4, 2, 3)]


def test_an_optimizer_that_is_made_anew_each_step_counts_at_once():
    model, other = network(), network()
    held = []
    with StepCounter() as counter:
        for _ in range(4):
            held.append(torch.optim.SGD(model.parameters(), lr=0.1))
            train(model, held[-1], [4])
            held.append(torch.optim.SGD(other.parameters(), lr=0.1))
            train(other, held[-1], [4])
        counter.end_last_step()
    assert len(counter.counted) == 4


def test_an_optimizer_in_another_ones_place_counts_from_its_second_step_on():
    old = []
    with StepCounter() as counter:
        for _ in range(3):
            model = network()
            old.append(torch.optim.SGD(model.parameters(), lr=0.1))
            train(model, old[-1], [4, 4, 4])
        counter.end_last_step()
    # Two times the first step of a new one is taken for a part of the next.
    assert len(counter.counted) == 9 - 2


def test_an_optimizer_in_backward_ends_no_step_within_it():
    model = network()
    parameters = list(model.parameters())
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in parameters}
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    with StepCounter() as counter:
        for _ in range(3):
            model(torch.randn(4, 8)).mean().backward()
        counter.end_last_step()
    assert len(counter.counted) == 3


def test_who_ends_steps_by_hand_is_not_helped():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StepCounter() as counter:
        counter.end_step()
        train(model, optimizer, [4, 2, 3])
        counter.end_last_step()
        counter.end_step()
    assert shapes_of(counter) == [(), ((4, 8), (2, 8), (3, 8))]


def test_a_model_called_with_keywords_shows_the_shapes_of_its_first_part():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, inputs):
            return self.inner(inputs)

    seen = []
    model = Wrapper()
    with StepCounter(called=lambda module, inputs, shapes: seen.append(shapes)) as counter:
        model(inputs=torch.randn(4, 8))
        counter.end_step()
    assert shapes_of(counter) == [((4, 8),)]
    assert seen == [((4, 8),)]


def test_it_leaves_no_hook_behind():
    ended = []
    with StepCounter(ended=lambda: ended.append(1)):
        pass
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), [4, 4])
    assert ended == []


def test_what_comes_next_is_known_when_a_step_ends():
    class Model(nn.Linear):
        def forward(self, x, *, scale=None):
            return super().forward(x) * scale

    model = Model(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    coming = []
    with StepCounter(lambda: coming.append(counter.coming)) as counter:
        batches = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(3)]
        for x, scale in batches:
            model(x, scale=scale).mean().backward()
            optimizer.step()
        counter.end_last_step()
    assert [sorted(map(id, tensors_in(each))) for each in coming] == [
        sorted(map(id, batch)) for batch in batches[1:]
    ] + [[]]


# Trials: a model is tried out before the first step -----------------------------------------------

TRIAL, STEP = (64, 8), (4, 8)


def call_without_gradients(model):
    model.eval()
    with torch.no_grad():
        model(torch.randn(TRIAL))
        model(torch.randn(TRIAL))
    model.train()


def call_a_part(model):
    with torch.no_grad():
        model[0](torch.randn(TRIAL))


def call_with_a_graph(model):
    model(torch.randn(TRIAL)).sum()


def gradients_of_inputs(model):
    inputs = torch.randn(TRIAL, requires_grad=True)
    torch.autograd.grad(model(inputs).sum(), inputs)


def training(trial, many=4):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trial(model)
    for _ in range(many):
        model(torch.randn(STEP)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


TRIALS = (call_without_gradients, call_a_part, call_with_a_graph, gradients_of_inputs)


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("way", ["watch", "measure", "predict"])
def test_a_trial_before_the_first_step_belongs_to_building(way, trial):
    if way == "watch":
        with watch() as w:
            for _ in training(trial):
                pass
        measured = w.measurement
    elif way == "measure":
        measured = measure(training, steps=3, trial=trial)
    else:
        measured = predict(training, steps=3, device="cpu", progress=False, trial=trial)
    first, *others = measured.steps
    # (A part of a model that was called first is what shows the shapes of its step.)
    assert [step.shapes for step in measured.steps] == [(STEP,)] * len(measured.steps)
    assert first.peak_bytes <= max(step.peak_bytes for step in others)
    assert measured.verdict.kind == "building"


def test_a_batch_that_is_smaller_than_the_trials_is_recorded_if_it_is_the_largest():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(every=1_000) as w:
        call_without_gradients(model)
        train(model, optimizer, [4] * 200)
        train(model, optimizer, [32])
    assert w.measurement.steps[200].peak_bytes is not None
