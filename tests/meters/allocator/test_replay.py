"""Histories, made up here and recorded on GPUs (tests/fixtures/allocator/README.md)."""

import gzip
import json
from pathlib import Path

import pytest

from memlab.meters.allocator import Allocator, Settings, Ties
from memlab.units import MiB

RECORDED = sorted((Path(__file__).parents[2] / "fixtures/allocator").glob("*.json.gz"))


def test_a_history_is_done_again():
    allocator = Allocator()
    allocator.replay(
        [
            ("segment_alloc", 0x700000, 20 * MiB, 0),
            ("alloc", 0x700000, 3 * MiB, 0),
            ("snapshot", 0, 0, 0),
            ("free_requested", 0x700000, 3 * MiB, 0),
            ("alloc", 0xA00000, 2 * MiB, 0),
            ("free_completed", 0x700000, 3 * MiB, 0),
            ("alloc", 0x700000, 3 * MiB, 0),
            ("free", 0xA00000, 2 * MiB, 0),
        ]
    )
    (segment,) = allocator.snapshot()
    assert [(b.address, b.size // MiB) for b in segment.blocks] == [(0x700000, 3), (0xA00000, 17)]
    assert allocator.peak_allocated_bytes == 3 * MiB + 2 * MiB
    assert allocator.peak_active_bytes == 5 * MiB


def test_a_segment_is_not_taken_because_it_was_recorded():
    allocator = Allocator()
    allocator.replay([("segment_alloc", 0x700000, 40 * MiB, 0), ("alloc", 0x700000, 2 * MiB, 0)])
    assert allocator.reserved_bytes == 20 * MiB
    (segment,) = allocator.snapshot()
    assert segment.address != 0x700000


def test_a_recorded_address_is_for_the_allocation_after_it_only():
    allocator = Allocator()
    allocator.replay(
        [
            ("alloc", 1, 20 * MiB, 0),
            ("free", 1, 0, 0),
            ("segment_alloc", 0x700000, 20 * MiB, 0),  # the GPU needed one here, we do not
            ("alloc", 2, 20 * MiB, 0),
            ("alloc", 3, 20 * MiB, 0),
            ("segment_alloc", 0x900000, 20 * MiB, 0),
        ]
    )
    allocator.allocate(20 * MiB)
    assert {0x700000, 0x900000}.isdisjoint(s.address for s in allocator.snapshot())
    assert allocator.reserved_bytes == 60 * MiB


def test_what_was_given_back_is_given_back():
    allocator = Allocator()
    allocator.replay(
        [
            ("segment_alloc", 0x8000000, 40 * MiB, 0),
            ("alloc", 0x8000000, 40 * MiB, 0),
            ("segment_alloc", 0x4000000, 30 * MiB, 0),
            ("alloc", 0x4000000, 30 * MiB, 0),
            ("free", 0x8000000, 0, 0),
            ("free", 0x4000000, 0, 0),
            ("segment_free", 0x8000000, 40 * MiB, 0),
        ]
    )
    assert allocator.reserved_bytes == 30 * MiB
    assert allocator.peak_reserved_bytes == 70 * MiB


def test_pages_that_were_unmapped_are_unmapped():
    allocator = Allocator(Settings(expandable_segments=True))
    unmapped = [("segment_unmap", page, 20 * MiB, 0) for page in (7, 8)]
    allocator.replay(
        [("alloc", 7, 35 * MiB, 0), ("free", 7, 0, 0), *unmapped, ("alloc", 7, 35 * MiB, 0)]
    )
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (40 * MiB, 40 * MiB)


def test_where_memory_runs_short_the_streams_were_waited_for():
    allocator = Allocator(limit=50 * MiB)
    allocator.replay(
        [
            ("alloc", 1, 40 * MiB, 0),
            ("free_requested", 1, 0, 0),
            ("alloc", 2, 30 * MiB, 0),
            ("free_completed", 1, 0, 0),
        ]
    )
    assert allocator.active_bytes == allocator.reserved_bytes == 30 * MiB


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([("free", 1, 0, 0)], "event 0 .free. frees 1, which was not allocated"),
        ([("free_completed", 1, 0, 0)], "Record from before the first allocation"),
        ([("alloc", 1, 9, 0), ("alloc", 1, 9, 0)], "event 1 allocates at 1, which is in use"),
        ([("alloc", 1, 9, 0), ("free", 1, 0, 0), ("free", 1, 0, 0)], "event 2 .free. frees 1"),
        ([("malloc", 1, 9, 0)], "event 0 has an unknown action, 'malloc'"),
    ],
)
def test_what_is_no_history_is_refused(events, words):
    with pytest.raises(ValueError, match=words):
        Allocator().replay(events)


def test_a_replay_needs_an_allocator_of_its_own():
    allocator = Allocator()
    allocator.allocate(10)
    with pytest.raises(ValueError, match="512 bytes are in use"):
        allocator.replay([])


def segment_bytes(events):
    """What a history's own segments come to: in the end, and at most."""
    held = most = 0
    for action, _, size, _ in events:
        if action in ("segment_alloc", "segment_map"):
            held += size
            most = max(most, held)
        elif action in ("segment_free", "segment_unmap"):
            held -= size
    return held, most


def test_the_segments_of_a_history_are_counted():
    assert segment_bytes(
        [("segment_alloc", 1, 20, 0), ("alloc", 1, 9, 0), ("segment_free", 1, 20, 0)]
    ) == (0, 20)


@pytest.mark.parametrize(
    "path",
    RECORDED
    or [
        pytest.param(
            None,
            marks=pytest.mark.skip(
                reason="no GPU's history is in tests/fixtures/allocator yet: of each, the simulated"
                " allocator would have to reserve the same bytes"
            ),
        )
    ],
    ids=lambda path: path and path.name,
)
def test_as_much_is_reserved_as_on_the_gpu(path):
    record = json.loads(gzip.decompress(path.read_bytes()))
    events = [tuple(event) for event in record["events"]]
    allocator = Allocator(
        Settings.parse(record["settings"]), limit=record["limit"], ties=Ties.of(record["torch"])
    )
    allocator.replay(events)
    reserved = allocator.reserved_bytes, allocator.peak_reserved_bytes
    assert reserved == segment_bytes(events)
    assert allocator.peak_reserved_bytes == record["peak_reserved_bytes"]
    assert allocator.peak_allocated_bytes == record["peak_allocated_bytes"]
