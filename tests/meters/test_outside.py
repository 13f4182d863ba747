"""What a run used and the allocator did not hand out."""

import torch

from memlab.ledger import Event, Observation
from memlab.meters.outside import outside
from memlab.meters.readings import Readings
from memlab.meters.recorded import Recorded
from memlab.meters.uses import Use

#: Two memory maps, and two storages that lie in them.
MAPS = [Event(1, 0x1000, 64), Event(2, 0x2000, 128)]
WORKER = Use(0x1000, 64, 5, shared=True)
FILE = Use(0x2000, 128, 5)


def outside_of(*uses, mapped=MAPS, arrays=()):
    readings = Readings([Event(1, 0x10, 100)], [], mapped=mapped, arrays=arrays)
    recorded = Recorded(torch.device("cpu"), readings, 0, 100, thread=1, uses=uses)
    missed = [Observation(use.seen, use.address, "batch") for use in uses if use.address != 0x10]
    return outside(recorded, missed)


def test_memory_maps_and_what_falls_on_no_block():
    array = Use(0x9000, 32, 5)
    counted = Use(0x10, 100, 5)
    assert outside_of(FILE, array, counted, mapped=MAPS[1:]) == (128 + 32, 32, 0, 0)
    assert outside_of(mapped=()) == (0, 0, 0, 0)


def test_what_is_gone_before_the_next_comes_is_not_added():
    assert outside_of(Use(0x9000, 32, 5, 6), Use(0x9900, 48, 7, 8), mapped=()) == (48, 48, 0, 0)


def test_shared_memory_is_told_from_files():
    assert outside_of(WORKER, FILE).shared_bytes == 64
    assert outside_of(FILE).shared_bytes == 0
    # Without a file, what no module was given is the workers', too: their targets.
    assert outside_of(WORKER) == (64 + 128, 0, 64 + 128, 0)


def test_numpys_arrays_count_once_whoever_uses_them():
    arrays = [Event(2, 0x9000, 4096), Event(3, 0xA000, 8192), Event(6, 0x9000, -4096)]
    tensor_of_an_array = Use(0xA000 + 64, 128, 5)
    # After its end, the array's place is another's.
    other = Use(0x9000, 32, 7)
    assert outside_of(tensor_of_an_array, mapped=(), arrays=arrays)[1:] == (12288, 0, 12288)
    assert outside_of(other, mapped=(), arrays=arrays[:1] + arrays[2:])[1:] == (4096, 0, 4096)
