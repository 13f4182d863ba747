"""A measurement is a function of what was recorded."""

import torch

from memlab.join import measurement_of
from memlab.ledger import Block, Event, Observation, Span
from memlab.meters.readings import Readings
from memlab.meters.recorded import Recorded

CPU = torch.device("cpu")


def recorded(readings: Readings, **more) -> Recorded:
    return Recorded(device=CPU, readings=readings, start=0, end=100, thread=1, **more)


def test_columns_come_from_what_was_seen():
    events = [Event(1, 0x10, 100), Event(5, 0x20, 40), Event(8, 0x20, -40)]
    seen = [Observation(2, 0x10, "parameters", "weight")]
    measured = measurement_of(
        recorded(
            Readings(events, []),
            observations=seen,
            spans=[Span(4, 9, "module"), Span(3, 10, "step")],
        )
    )
    assert measured.peak_bytes == 140 and measured.columns["parameters"] == 100
    assert measured.columns["temporaries"] == 40 and measured.phase == "forward"
    assert measured.reserved_bytes is None and measured.workspace_bytes is None


def test_a_counter_is_the_truth_and_the_rest_is_unattributed():
    readings = Readings([Event(1, 0x10, 100)], [], allocated_before=50, peak_allocated=512)
    assert measurement_of(recorded(readings)).columns["unattributed"] == 512 - 50
    counted = measurement_of(recorded(readings, counts_alive=True))
    assert counted.peak_bytes == 512 == sum(counted.columns.values())


def test_half_a_history_is_none():
    readings = Readings([Event(1, 0x10, 100)], [], complete=False, peak_allocated=300)
    measured = measurement_of(recorded(readings))
    assert measured.peak_bytes == 300 and not measured.ledger.blocks


def test_blocks_from_before_count_where_they_are_given():
    alive = [Block(70, 0x50, -1)]
    measured = measurement_of(recorded(Readings([], []), alive=alive, counts_alive=True))
    assert measured.peak_bytes == 70
