"""A recording: one at a time, and a value of what was seen at its end."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlab.meters.recording import Recording

CPU = torch.device("cpu")


def test_what_was_seen_is_there_at_the_end():
    with Recording(CPU) as recording:
        assert recording.recorded is None
        model = nn.Linear(8, 8)
        recording.begin_steps()
        recording.run_step(lambda: model(torch.ones(1, 8)).sum())
    recorded = recording.recorded
    assert recorded.device == CPU and recorded.start < recorded.end
    assert recorded.devices == {CPU} and not recorded.counts_alive
    assert {span.kind for span in recorded.spans} >= {"module", "operator", "step"}
    assert {seen.column for seen in recorded.observations} >= {"parameters", "batch"}


def test_one_at_a_time():
    with Recording(CPU):
        with pytest.raises(RuntimeError, match="a measurement is running already"):
            Recording(CPU).__enter__()
    with Recording(CPU):
        pass


def test_what_is_alive_is_counted_only_when_asked_for():
    kept = torch.zeros(1000)
    for counts_alive in (False, True):
        with Recording(CPU, counts_alive=counts_alive) as recording:
            pass
        addresses = {block.address for block in recording.recorded.alive}
        assert (kept.data_ptr() in addresses) == counts_alive
        assert kept.data_ptr() in recording.recorded.before


def test_steps_begin_when_a_model_is_first_called():
    with Recording(CPU) as recording:
        model = nn.Linear(8, 8)

        def step():
            built = torch.zeros(100)  # a part of building, though the step has begun
            return model(built[:8]).sum()

        recording.begin_steps_at_first_call()
        recording.run_step(step)
        recording.run_step(step)
    first, second = (span for span in recording.recorded.spans if span.kind == "step")
    called = min(span.start for span in recording.recorded.spans if span.kind == "module")
    assert first.start <= called < first.end <= second.start


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_model_that_is_tried_out_is_still_being_built(reentrant):
    """None: without a checkpoint. The trial is a model's whole forward, with gradients or not."""

    def train():
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        forward = model
        if reentrant is not None:
            forward = partial(checkpoint, model, use_reentrant=reentrant)
        model(torch.ones(1, 8))
        with torch.no_grad():
            model(torch.ones(1, 8))
        while True:
            loss = forward(torch.ones(1, 8, requires_grad=True)).sum()
            loss.backward()
            yield loss.detach()

    with Recording(CPU) as recording:
        started = train()
        recording.begin_steps_at_first_call()
        for _ in range(2):
            recording.run_step(lambda: next(started))
    spans = recording.recorded.spans
    calls = [span for span in spans if span.kind == "module" and span.name == "Sequential"]
    first, _ = (span for span in spans if span.kind == "step")
    assert first.start == sorted(calls)[2].start


def test_a_step_that_returns_a_function_is_refused():
    with Recording(CPU) as recording:
        with pytest.raises(ValueError, match="not yet called"):
            recording.run_step(lambda: len)
