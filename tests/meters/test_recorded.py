"""What one recording saw is one value, which nobody changes."""

import dataclasses

import pytest
import torch

from memlab.meters.readings import Readings
from memlab.meters.recorded import Recorded


def test_it_cannot_be_changed_and_nothing_was_seen_unless_it_is_said():
    recorded = Recorded(torch.device("cpu"), Readings([], []), start=0, end=1, thread=1)
    assert not any((recorded.observations, recorded.spans, recorded.alive, recorded.uses))
    assert not (recorded.counts_alive or recorded.nothing_to_train or recorded.evaluating)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recorded.end = 2
