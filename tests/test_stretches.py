"""Stretches of a long loop: one is kept whole, of the others their steps."""

import torch

from memlab.ledger import Counted, Event, Span
from memlab.meters.readings import Readings
from memlab.meters.recorded import Recorded
from memlab.stretches import Stretches


def stretch(start, size):
    """Two steps of 10 nanoseconds each; in each, `size` bytes live for a moment."""
    events = [
        Event(start + 2, 16, size),
        Event(start + 4, 16, -size),
        Event(start + 12, 16, size),
        Event(start + 14, 16, -size),
    ]
    spans = [Span(start, start + 10, "step"), Span(start + 10, start + 20, "step")]
    readings = Readings(events, [])
    return Recorded(torch.device("cpu"), readings, start, start + 21, 0, True, spans=spans)


def test_the_highest_is_kept_with_the_steps_of_all():
    counted = [Counted(number, 10 * number, 10 * number + 10) for number in range(10)]
    stretches = Stretches()
    assert stretches.measurement(counted) is None
    stretches.add(stretch(0, 100), counted[0:2])
    stretches.add(stretch(40, 300), counted[4:6])
    stretches.add(stretch(70, 200), counted[7:9])
    measurement = stretches.measurement(counted)
    assert measurement.peak_bytes == 300
    peaks = [step.peak_bytes for step in measurement.steps]
    assert peaks == [100, 100, None, None, 300, 300, None, 200, 200, None]
    assert measurement.bytes_after_step == ()  # not known of all
    assert "recorded in full: 6 of 10 steps" in str(measurement)
