"""The history that CUDA's allocator records, made by hand."""

import pytest

from memlab.ledger import Block, Event, build_ledger
from memlab.meters.cuda_history import read_alive, read_history, split_workspaces

MiB = 2**20


def entry(action: str, address: int, size: int, time_us: int) -> dict:
    """An entry of the allocator's history, with the fields that PyTorch gives it."""
    return {
        "action": action,
        "addr": address,
        "size": size,
        "time_us": time_us,
        "stream": 0,
        "frames": [],
    }


def test_a_history_made_by_hand():
    history = [
        entry("segment_alloc", 0x1000, 2 * MiB, 1),
        entry("alloc", 0x1000, 1000, 2),
        entry("alloc", 0x1400, 512, 2),
        entry("free_requested", 0x1000, 1000, 3),
        entry("free_completed", 0x1000, 1000, 3),
        entry("alloc", 0x1000, 1, 4),
        {
            "action": "oom",
            "size": 5 * MiB,
            "device_free": 0,
            "time_us": 5,
            "stream": 0,
            "frames": [],
        },
        {"action": "snapshot", "addr": 0, "size": 0, "time_us": 6, "stream": 0, "frames": []},
        entry("free_requested", 0x1400, 512, 7),
        entry("free_completed", 0x1400, 512, 9),
        entry("segment_free", 0x1000, 2 * MiB, 10),
    ]
    events = read_history(history)
    assert events == [
        Event(2000, 0x1000, 1024),
        Event(2000, 0x1400, 512),
        Event(3000, 0x1000, -1024),
        Event(4000, 0x1000, 512),
        Event(7000, 0x1400, -512),
    ]
    ledger, _ = build_ledger(events)
    assert ledger.timeline().total.tolist() == [1024, 1536, 512, 1024, 512]


@pytest.mark.parametrize(
    "size, rounded", [(1, 512), (511, 512), (512, 512), (513, 1024), (MiB, MiB)]
)
def test_the_allocator_hands_out_multiples_of_512(size, rounded):
    assert read_history([entry("alloc", 1, size, 1)])[0].bytes == rounded


def test_the_counters_fall_when_a_return_is_asked_for():
    """Not when the streams are done with the block (`free_completed`)."""
    history = [
        entry("alloc", 1, 512, 1),
        entry("free_requested", 1, 512, 5),
        entry("free_completed", 1, 512, 50),
    ]
    assert [event.time for event in read_history(history)] == [1000, 5000]


def test_workspaces_are_parted_from_the_run():
    """They are the blocks that go when the workspaces are cleared, after the run."""
    run = [
        Event(1, 0x10, 100),
        Event(3, 0x30, 50),
        Event(4, 0x10, -100),
        Event(6, 0x10, 70),
        Event(7, 0x10, -70),
    ]
    forward, backward = Event(2, 0x20, 32), Event(5, 0x40, 32)
    cleared = [Event(100, 0x20, -32), Event(101, 0x40, -32)]
    events = sorted([*run, forward, backward]) + cleared
    # All together peak at time 6 with 50 + 70 + 64 bytes, or at 3 with 100 + 50 + 32: at 6 both
    # workspaces are there.
    assert split_workspaces(events, ended=90) == (run, (64, 64))
    # A history that begins after the first of them: it was there all the time.
    assert split_workspaces(events[2:], ended=90)[1] == (64, 64)
    assert split_workspaces(run, ended=90) == (run, (0, 0))
    early = (
        sorted([Event(1, 0x10, 100), Event(2, 0x20, 32), Event(3, 0x10, -100), Event(5, 0x40, 32)])
        + cleared
    )
    assert split_workspaces(early, ended=90)[1] == (64, 32)


def test_a_block_that_outlives_the_run_is_no_workspace():
    events = [Event(1, 0x10, 100), Event(2, 0x20, 32), Event(100, 0x20, -32)]
    assert split_workspaces(events, ended=90) == ([Event(1, 0x10, 100)], (32, 32))


def test_what_is_alive_stands_in_the_allocators_map():
    def block(size, state):
        return {"size": size, "state": state}

    here, elsewhere = (
        {
            "device": index,
            "address": 0x1000,
            "blocks": [
                block(512, "active_allocated"),
                block(1024, "inactive"),
                block(512, "active_allocated"),
            ],
        }
        for index in (0, 1)
    )
    assert read_alive([here, elsewhere], 0) == [Block(512, 0x1000, 0), Block(512, 0x1600, 0)]
