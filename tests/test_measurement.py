"""A measurement in words, from its steps."""

import pytest
import torch
from torch import nn

from memlab import measure


@pytest.fixture(scope="module")
def grown():
    def train():
        model = nn.Linear(64, 64)
        losses = []
        for _ in range(4):
            loss = model(torch.randn(256, 64)).square().mean()
            loss.backward(retain_graph=True)
            losses.append(loss)
            yield loss

    return measure(train, steps=4)


def test_it_ends_with_the_verdict(grown):
    assert str(grown).splitlines()[-1] == grown.verdict.sentence
    assert grown.verdict.kind == "creep"
    assert "list `losses`" in grown._repr_html_() and "<svg" in grown._repr_html_()


def test_its_steps_are_those_of_the_run(grown):
    assert [step.number for step in grown.steps] == [1, 2, 3, 4]
    assert all(step.shapes == ((256, 64),) for step in grown.steps)
    assert max(step.peak_bytes for step in grown.steps) == grown.peak_bytes
    assert grown.bytes_after_step == tuple(step.bytes_after for step in grown.steps)


def test_building_is_told_apart(grown):
    assert grown.building_peak_bytes < grown.steps[0].peak_bytes
    assert grown.ledger.phase_at(grown.ledger.start) == "building"
