"""What a meter says when it has stopped."""

import torch

from memlab.meters import device
from memlab.meters.readings import Readings

CPU = torch.device("cpu")


def test_a_meter_gives_readings():
    meter = device.meter_for(CPU)
    meter.start()
    kept = torch.zeros(1000)
    readings = meter.stop()
    assert isinstance(readings, Readings) and readings.one_thread and readings.complete
    assert kept.nbytes in [event.bytes for event in readings.events]
    assert readings.peak_allocated is None and readings.alive is None
