import pytest

from memlab.meters.allocator import Allocator, Ties
from memlab.meters.allocator.blocks import Block
from memlab.units import MiB


@pytest.mark.parametrize(
    ("version", "ties"),
    [
        ("2.10.0", Ties.ADDRESS),
        ("2.11.0+cu130", Ties.ADDRESS),
        ("2.12.0", Ties.BLOCK),
        ("2.13.0+cpu", Ties.SEGMENT),
        ("3.0.0", Ties.SEGMENT),
    ],
)
def test_each_release_has_its_rule(version, ties):
    assert Ties.of(version) is ties


def free_segments(allocator, *addresses):
    """Segments of 20 MiB, made in this order at these addresses, all free."""
    events = []
    for address in addresses:
        events += [("segment_alloc", address, 20 * MiB, 0), ("alloc", address, 20 * MiB, 0)]
    allocator.replay(events + [("free", address, 0, 0) for address in addresses])


@pytest.mark.parametrize(
    ("ties", "first"), [(Ties.ADDRESS, 1 << 30), (Ties.BLOCK, 2 << 30), (Ties.SEGMENT, 2 << 30)]
)
def test_of_equal_segments_the_lowest_or_the_oldest_is_taken(ties, first):
    allocator = Allocator(ties=ties)
    free_segments(allocator, 2 << 30, 1 << 30)
    assert allocator.allocate(20 * MiB) == first


@pytest.mark.parametrize(("ties", "taken"), [(Ties.ADDRESS, 0), (Ties.BLOCK, 1), (Ties.SEGMENT, 0)])
def test_of_equal_blocks_in_a_segment_the_lowest_or_the_first_made_is_taken(ties, taken):
    """When a block is split the front is made anew: freed in any order, the front is younger."""
    allocator = Allocator(ties=ties)
    blocks = [allocator.allocate(512 * 1024) for _ in range(4)]
    # The segment's first block is now the last of the four.
    candidates = [blocks[0], blocks[3]]
    for address in candidates:
        allocator.free(address)
    assert allocator.allocate(512 * 1024) == candidates[taken]


def test_freed_neighbours_become_one_block():
    allocator = Allocator()
    first, middle, last = (allocator.allocate(512 * 1024) for _ in range(3))

    def free_sizes():
        (segment,) = allocator.snapshot()
        return [block.size // 1024 for block in segment.blocks if block.state == "inactive"]

    assert free_sizes() == [512]
    allocator.free(first)
    assert free_sizes() == [512, 512]
    allocator.free(last)  # with what is free behind it
    assert free_sizes() == [512, 1024]
    allocator.free(middle)  # with both
    assert free_sizes() == [2048]


def test_segments_are_not_merged():
    allocator = Allocator()
    for address in [allocator.allocate(20 * MiB) for _ in range(2)]:
        allocator.free(address)
    assert [len(segment.blocks) for segment in allocator.snapshot()] == [1, 1]


def test_a_block_that_another_stream_may_use_is_not_merged():
    allocator = Allocator()
    first, second = (allocator.allocate(MiB) for _ in range(2))
    allocator.request_free(first)
    allocator.free(second)
    (segment,) = allocator.snapshot()
    assert [block.state for block in segment.blocks] == ["active_pending_free", "inactive"]
    allocator.complete_free(first)
    (segment,) = allocator.snapshot()
    assert [block.size for block in segment.blocks] == [2 * MiB]


def test_a_block_knows_whether_it_is_free():
    block = Block(None, 0, 0, 512, 0)
    assert block.is_free() and not block.is_split()
    block.pending = True
    assert not block.is_free()
