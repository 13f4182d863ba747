"""Which free block is taken, how much of it, and which are given back."""

import pytest

from memlab.meters.allocator import Allocator, OutOfMemory, Settings
from memlab.units import MiB


def cached(allocator, *sizes, stream=0):
    """Leave a free segment of each size, and return their addresses."""
    addresses = [allocator.allocate(size, stream) for size in sizes]
    for address in addresses:
        allocator.free(address)
    return addresses


def segments(allocator):
    return [segment.size // MiB for segment in allocator.snapshot()]


def test_the_smallest_block_that_is_large_enough_is_taken():
    allocator = Allocator()
    _, middle, _ = cached(allocator, 40 * MiB, 24 * MiB, 30 * MiB)
    assert allocator.allocate(23 * MiB) == middle
    assert allocator.reserved_bytes == 94 * MiB


def test_small_and_large_requests_have_pools_of_their_own():
    allocator = Allocator()
    cached(allocator, 40 * MiB)
    allocator.allocate(MiB)  # kSmallSize is small
    assert [s.pool for s in allocator.snapshot()] == ["large", "small"]
    assert segments(allocator) == [40, 2]


def test_a_block_is_not_reused_on_another_stream():
    allocator = Allocator()
    (address,) = cached(allocator, 40 * MiB)
    assert allocator.allocate(40 * MiB, stream=7) != address
    assert allocator.reserved_bytes == 80 * MiB


@pytest.mark.parametrize(
    ("size", "allocated"),
    [
        (19 * MiB, 20 * MiB),  # 1 MiB would be left over: not more than kSmallSize
        (19 * MiB - 512, 19 * MiB - 512),
    ],
)
def test_a_large_block_is_split_when_more_than_one_mebibyte_is_left(size, allocated):
    allocator = Allocator()
    cached(allocator, 20 * MiB)
    allocator.allocate(size)
    assert allocator.allocated_bytes == allocated
    assert allocator.reserved_bytes == 20 * MiB


def test_a_small_block_is_split_when_512_bytes_are_left():
    allocator = Allocator()
    allocator.allocate(MiB)
    second = allocator.allocate(MiB - 512)
    third = allocator.allocate(1)
    assert third == second + MiB - 512
    assert allocator.reserved_bytes == allocator.allocated_bytes == 2 * MiB


OVERSIZE = Settings(max_split_size=100 * MiB)


def test_an_oversize_block_is_not_taken_for_a_smaller_request():
    allocator = Allocator(OVERSIZE)
    cached(allocator, 200 * MiB)
    allocator.allocate(90 * MiB)
    assert segments(allocator) == [200, 90]


@pytest.mark.parametrize(("asked", "reserved"), [(181, 200), (180, 380)])
def test_an_oversize_block_may_be_less_than_20_mebibytes_too_large(asked, reserved):
    allocator = Allocator(OVERSIZE)
    cached(allocator, 200 * MiB)
    allocator.allocate(asked * MiB)
    assert allocator.reserved_bytes == reserved * MiB


def test_how_much_too_large_can_be_set():
    settings = Settings(max_split_size=100 * MiB, max_non_split_rounding=60 * MiB)
    allocator = Allocator(settings)
    cached(allocator, 200 * MiB)
    allocator.allocate(150 * MiB)
    assert allocator.reserved_bytes == allocator.allocated_bytes == 200 * MiB  # and is not split


def test_one_oversize_block_is_given_back_where_it_is_enough():
    allocator = Allocator(OVERSIZE, limit=400 * MiB)
    cached(allocator, 120 * MiB, 160 * MiB, 30 * MiB)
    allocator.allocate(110 * MiB)  # the 120 MiB would do
    allocator.allocate(130 * MiB)  # needs the driver: the 160 MiB are 30 MiB too large
    assert segments(allocator) == [120, 30, 130]


def test_several_oversize_blocks_are_given_back_the_largest_first():
    allocator = Allocator(OVERSIZE, limit=420 * MiB)
    cached(allocator, 120 * MiB, 110 * MiB, 150 * MiB, 40 * MiB)
    allocator.allocate(250 * MiB)
    assert segments(allocator) == [110, 40, 250]


def test_where_oversize_blocks_are_not_enough_all_go():
    allocator = Allocator(OVERSIZE, limit=420 * MiB)
    cached(allocator, 120 * MiB, 110 * MiB, 90 * MiB, 50 * MiB)
    allocator.allocate(300 * MiB)  # with the 90 MiB they would be, but those may be split
    assert segments(allocator) == [300]


def test_whole_free_segments_are_given_back_before_memory_runs_out():
    allocator = Allocator(limit=100 * MiB)
    cached(allocator, 30 * MiB, 40 * MiB)
    cached(allocator, 12 * MiB, stream=1)
    kept = allocator.allocate(10)
    allocator.allocate(98 * MiB)
    assert segments(allocator) == [2, 98]
    allocator.free(kept)


def test_a_split_segment_is_not_given_back():
    allocator = Allocator(limit=100 * MiB)
    cached(allocator, 60 * MiB)
    allocator.allocate(12 * MiB)  # 48 MiB of the 60 stay free
    with pytest.raises(OutOfMemory):
        allocator.allocate(50 * MiB)
    assert allocator.reserved_bytes == 60 * MiB


COLLECTING = Settings(garbage_collection_threshold=0.5)


@pytest.mark.parametrize(("allowed", "left"), [(300, [60, 80, 62]), (200, [80, 62])])
def test_beyond_the_threshold_what_was_unused_for_longest_is_given_back(allowed, left):
    allocator = Allocator(COLLECTING, allowed=allowed * MiB)
    cached(allocator, 40 * MiB)
    for _ in range(5):
        cached(allocator, 60 * MiB)
    allocator.allocate(80 * MiB)  # 100 MiB are held: not more than half of what is allowed
    assert segments(allocator) == [40, 60, 80]
    allocator.allocate(61 * MiB)  # 180 MiB are held: 30 too many, or 80
    assert segments(allocator) == left


def test_without_an_allowance_nothing_is_collected():
    allocator = Allocator(COLLECTING, limit=200 * MiB)
    cached(allocator, 40 * MiB, 60 * MiB)
    allocator.allocate(80 * MiB)
    assert segments(allocator) == [40, 60, 80]
