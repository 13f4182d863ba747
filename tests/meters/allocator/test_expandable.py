"""Segments that grow: pages of 2 MiB in the small pool, of 20 MiB in the large one."""

import pytest

from memlab.meters.allocator import Allocator, OutOfMemory, Settings
from memlab.units import MiB

EXPANDABLE = Settings(expandable_segments=True)


def ranges(allocator):
    """The mapped ranges in MiB: address from where the first begins, and size."""
    segments = allocator.snapshot()
    return [((s.address - segments[0].address) // MiB, s.size // MiB) for s in segments]


def test_a_segment_grows_by_whole_pages():
    allocator = Allocator(EXPANDABLE)
    first = allocator.allocate(30 * MiB)
    assert allocator.reserved_bytes == 40 * MiB
    second = allocator.allocate(25 * MiB)  # 10 MiB are left; 15 more need one page
    assert second == first + 30 * MiB
    assert allocator.reserved_bytes == 60 * MiB
    third = allocator.allocate(5 * MiB)
    assert third == second + 25 * MiB
    assert allocator.reserved_bytes == allocator.allocated_bytes == 60 * MiB
    assert ranges(allocator) == [(0, 60)]


def test_the_small_pool_and_each_stream_have_their_own():
    allocator = Allocator(EXPANDABLE)
    allocator.allocate(MiB)
    assert allocator.reserved_bytes == 2 * MiB
    allocator.allocate(12 * MiB)
    assert allocator.reserved_bytes == 22 * MiB
    allocator.allocate(12 * MiB, stream=5)
    assert allocator.reserved_bytes == 42 * MiB
    segments = allocator.snapshot()
    assert [(s.pool, s.stream, s.size // MiB) for s in segments] == [
        ("small", 0, 2),
        ("large", 0, 20),
        ("large", 5, 20),
    ]
    assert all(segment.expandable for segment in segments)


def test_the_page_of_the_large_pool_can_be_set():
    settings = Settings(expandable_segments=True, large_segment_size=64 * MiB)
    allocator = Allocator(settings)
    allocator.allocate(65 * MiB)
    assert allocator.reserved_bytes == 128 * MiB


def test_also_in_the_large_pool_512_bytes_are_split_off():
    allocator = Allocator(EXPANDABLE)
    allocator.allocate(20 * MiB - 512)
    assert allocator.allocated_bytes == 20 * MiB - 512


def test_a_growing_batch_reuses_what_fixed_segments_cannot():
    reserved = []
    for settings in (Settings(), EXPANDABLE):
        allocator = Allocator(settings)
        for size in (100 * MiB, 120 * MiB, 140 * MiB):
            allocator.free(allocator.allocate(size))
        reserved.append(allocator.reserved_bytes // MiB)
    assert reserved == [360, 140]


def test_a_block_that_cannot_grow_is_taken_before_one_that_can():
    allocator = Allocator(EXPANDABLE)
    blocks = [allocator.allocate(10 * MiB) for _ in range(5)]  # 10 MiB stay free at the end
    allocator.free(blocks[1])
    allocator.free(blocks[2])  # a gap of 20 MiB
    assert allocator.allocate(10 * MiB) == blocks[1]


def test_the_cache_gives_back_whole_pages_only():
    allocator = Allocator(EXPANDABLE)
    blocks = [allocator.allocate(15 * MiB) for _ in range(8)]  # 120 MiB
    for block in blocks[1:5]:  # from 15 to 75
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 80 * MiB  # the pages from 20 to 60 are gone
    assert ranges(allocator) == [(0, 20), (60, 60)]
    # The lowest address with room is filled first, with what is free in front of it.
    assert allocator.allocate(20 * MiB) == blocks[1]
    assert ranges(allocator) == [(0, 40), (60, 60)]


def test_a_hole_is_filled_up_to_what_is_free_behind_it():
    allocator = Allocator(EXPANDABLE)
    blocks = [allocator.allocate(15 * MiB) for _ in range(8)]
    for block in blocks[1:5]:
        allocator.free(block)
    allocator.empty_cache()  # free from 15 to 20, unmapped to 60, free to 75
    assert allocator.allocate(58 * MiB) == blocks[1]
    assert allocator.reserved_bytes == 120 * MiB and ranges(allocator) == [(0, 120)]


def test_of_a_segment_that_is_free_nothing_is_left():
    allocator = Allocator(EXPANDABLE)
    first = allocator.allocate(30 * MiB)
    allocator.free(first)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0 and allocator.snapshot() == []
    assert allocator.allocate(30 * MiB) != first  # a new segment, at other addresses


def test_memory_of_one_stream_goes_to_another_before_it_runs_out():
    allocator = Allocator(EXPANDABLE, limit=100 * MiB)
    allocator.free(allocator.allocate(80 * MiB))
    allocator.allocate(60 * MiB, stream=1)
    assert allocator.reserved_bytes == 60 * MiB
    assert allocator.peak_reserved_bytes == 80 * MiB


def test_running_out_leaves_what_was_there():
    allocator = Allocator(EXPANDABLE, limit=100 * MiB)
    kept = allocator.allocate(50 * MiB)
    with pytest.raises(OutOfMemory):
        allocator.allocate(60 * MiB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (50 * MiB, 60 * MiB)
    assert allocator.allocate(50 * MiB) == kept + 50 * MiB


def test_an_oversize_block_is_only_used_where_its_segment_would_grow():
    """By get_free_block it is too large; find_expandable_block takes it, in front of the pages that
    it would map.
    """
    allocator = Allocator(
        Settings(expandable_segments=True, max_split_size=40 * MiB), limit=120 * MiB
    )
    first = allocator.allocate(100 * MiB)
    allocator.free(first)
    assert allocator.allocate(30 * MiB) == first
    allocator.free(first)

    assert allocator.allocate(100 * MiB) == first
    allocator.allocate(2 * MiB)  # it needs a page behind it
    allocator.free(first)
    allocator.allocate(18 * MiB)
    assert allocator.reserved_bytes == 120 * MiB
    # Now it is too large, there is no more memory, and no block can go by itself: its pages go.
    assert allocator.allocate(30 * MiB) == first
    assert allocator.reserved_bytes == 60 * MiB


def test_a_request_larger_than_the_addresses_set_aside_gets_enough():
    allocator = Allocator(EXPANDABLE)
    allocator.allocate(2 << 40)
    assert allocator.reserved_bytes == -(-(2 << 40) // (20 * MiB)) * 20 * MiB
