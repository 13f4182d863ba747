"""The allocator as a whole: hand-counted examples, and what holds whatever is asked of it.

The single rules are tried in the files beside this one.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlab.meters.allocator import Allocator, OutOfMemory, Settings, Ties
from memlab.units import GiB, MiB


def test_a_small_run_counted_by_hand():
    allocator = Allocator()
    weights = allocator.allocate(4_000_000)  # 4,000,256: in a segment of 20 MiB
    bias = allocator.allocate(4_000)  # 4,096: in one of 2 MiB
    activations = allocator.allocate(50_000_000)  # 50,000,384: in one of 48 MiB, as 1 MiB is left..
    assert allocator.allocated_bytes == 4_000_256 + 4_096 + 48 * MiB  # .. over by less than 1 MiB
    assert allocator.reserved_bytes == 70 * MiB
    allocator.free(activations)
    gradient = allocator.allocate(4_000_000)  # in the rest of the first segment: the best fit
    assert gradient == weights + 4_000_256
    for address in (weights, bias, gradient):
        allocator.free(address)
    assert allocator.allocated_bytes == allocator.active_bytes == 0
    assert allocator.peak_allocated_bytes == 4_000_256 + 4_096 + 48 * MiB
    assert allocator.reserved_bytes == allocator.peak_reserved_bytes == 70 * MiB
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0 and allocator.snapshot() == []
    assert allocator.peak_reserved_bytes == 70 * MiB


def test_nothing_is_allocated_for_no_bytes():
    allocator = Allocator()
    assert allocator.allocate(0) == 0
    allocator.free(0)
    assert allocator.allocated_bytes == allocator.reserved_bytes == 0


def test_a_block_that_another_stream_uses_is_active_and_not_allocated():
    allocator = Allocator()
    address = allocator.allocate(MiB)
    allocator.request_free(address)
    assert (allocator.allocated_bytes, allocator.active_bytes) == (0, MiB)
    assert allocator.is_pending(address)
    assert allocator.allocate(MiB) != address
    allocator.complete_free(address)
    assert (allocator.active_bytes, allocator.peak_active_bytes) == (MiB, 2 * MiB)
    assert not allocator.is_pending(address)


def test_the_streams_are_waited_for_before_the_cache_is_emptied():
    allocator = Allocator()
    allocator.request_free(allocator.allocate(40 * MiB))
    allocator.empty_cache()
    assert allocator.active_bytes == allocator.reserved_bytes == 0


def test_one_segment_can_be_given_back():
    allocator = Allocator()
    first, second = (allocator.allocate(40 * MiB) for _ in range(2))
    allocator.release_segment(first)  # in use
    assert allocator.reserved_bytes == 80 * MiB
    allocator.free(first)
    allocator.free(second)
    allocator.release_segment(first)
    assert [segment.address for segment in allocator.snapshot()] == [second]


@pytest.mark.parametrize("size", [-1, 1.5, True, "512", None])
def test_only_bytes_can_be_allocated(size):
    with pytest.raises(ValueError, match="a number of bytes"):
        Allocator().allocate(size)


@pytest.mark.parametrize("limits", [{"limit": "24 GiB"}, {"allowed": -1}, {"limit": 1.5}])
def test_limits_are_bytes(limits):
    with pytest.raises(ValueError, match="is a number of bytes, or None"):
        Allocator(**limits)


def test_only_what_is_allocated_can_be_freed():
    allocator = Allocator()
    address = allocator.allocate(10)
    with pytest.raises(ValueError, match="request_free first"):
        allocator.complete_free(address)
    with pytest.raises(ValueError, match="nothing is allocated at address 123"):
        allocator.free(123)
    allocator.free(address)
    with pytest.raises(ValueError, match="freed before"):
        allocator.free(address)
    assert allocator.allocated_bytes == 0 and allocator.reserved_bytes == 2 * MiB


# --- What holds whatever is asked -----------------------------------------------------------------

# A size to allocate; the number of a block to free; or the cache to be emptied. The sizes lie
# around those at which a rule changes.
_SIZES = st.one_of(
    st.integers(0, 3 * MiB),
    st.integers(9 * MiB, 11 * MiB),
    st.integers(0, 400).map(lambda mebibytes: mebibytes * MiB),
)
_DOINGS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), _SIZES, st.integers(0, 1)),
        st.tuples(st.sampled_from(["free", "request"]), st.integers(0, 30)),
        st.tuples(st.just("empty")),
    ),
    max_size=60,
)
_SETTINGS = st.builds(
    Settings,
    max_split_size=st.sampled_from([None, 20 * MiB, 100 * MiB]),
    roundup_power2_divisions=st.sampled_from([None, 4]),
    expandable_segments=st.booleans(),
    garbage_collection_threshold=st.sampled_from([None, 0.5]),
)
_ALLOCATORS = st.builds(
    Allocator,
    _SETTINGS,
    limit=st.sampled_from([None, 1 * GiB]),
    allowed=st.sampled_from([None, 1 * GiB]),
    ties=st.sampled_from(Ties),
)


def run(allocator, doings):
    """Do it all, with a look at the allocator after each; return the events as a history."""
    alive = []
    pending = []
    events = []
    for doing, *values in doings:
        if doing == "allocate":
            size, stream = values
            try:
                address = allocator.allocate(size, stream)
            except OutOfMemory as error:
                assert error.limit or error.allowed
                pending.clear()  # the streams were waited for
            else:
                if address:
                    alive.append(address)
                    events.append(("alloc", address, size, stream))
        elif doing == "empty":
            allocator.empty_cache()
            pending.clear()
        elif alive:
            address = alive.pop(values[0] % len(alive))
            if doing == "free":
                allocator.free(address)
                events.append(("free", address, 0, 0))
            else:
                allocator.request_free(address)
                pending.append(address)
        check(allocator)
    # Giving memory back inside of an allocation has waited for the streams, too.
    for address in pending:
        if allocator.is_pending(address):
            allocator.complete_free(address)
    for address in alive:
        allocator.free(address)
    check(allocator)
    return events


def check(allocator):
    """The books agree with the blocks, and no byte belongs to two of them."""
    segments = allocator.snapshot()
    assert sum(segment.size for segment in segments) == allocator.reserved_bytes
    states = {"active_allocated": 0, "active_pending_free": 0, "inactive": 0}
    end = 0
    for segment in segments:
        assert segment.address >= end
        end = segment.address
        last = None
        for block in segment.blocks:
            assert block.address == end and block.size > 0 and block.size % 512 == 0
            assert not last == block.state == "inactive", "two free neighbours"
            end, last = block.address + block.size, block.state
            states[block.state] += block.size
        assert end == segment.address + segment.size
    assert states["active_allocated"] == allocator.allocated_bytes
    assert states["active_pending_free"] == allocator.active_bytes - allocator.allocated_bytes
    assert allocator.allocated_bytes <= allocator.peak_allocated_bytes
    assert allocator.active_bytes <= allocator.peak_active_bytes <= allocator.peak_reserved_bytes
    assert allocator.reserved_bytes <= allocator.peak_reserved_bytes
    if allocator._driver.limit is not None:
        assert allocator.peak_reserved_bytes <= allocator._driver.limit


@given(_ALLOCATORS, _DOINGS)
def test_every_byte_is_counted_once(allocator, doings):
    run(allocator, doings)
    assert allocator.active_bytes == allocator.allocated_bytes == 0
    # With all freed, each segment is one block again.
    assert all(len(segment.blocks) == 1 for segment in allocator.snapshot())
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0 and allocator.snapshot() == []


@given(_SETTINGS, st.sampled_from(Ties), _DOINGS)
def test_peaks_only_rise(settings, ties, doings):
    allocator = Allocator(settings, ties=ties)
    before = (0, 0, 0)
    for doing in doings:
        if doing[0] == "allocate":
            address = allocator.allocate(*doing[1:])
            if address and doing[1] % 2:
                allocator.free(address)
        now = (
            allocator.peak_allocated_bytes,
            allocator.peak_active_bytes,
            allocator.peak_reserved_bytes,
        )
        assert all(earlier <= later for earlier, later in zip(before, now, strict=True))
        before = now


@given(_SETTINGS, st.sampled_from(Ties), _DOINGS)
def test_a_replay_equals_what_was_replayed(settings, ties, doings):
    live = Allocator(settings, ties=ties)
    events = run(live, [doing for doing in doings if doing[0] in ("allocate", "free")])
    freed = {event[1] for event in events if event[0] == "free"}
    replayed = Allocator(settings, ties=ties)
    replayed.replay(events)
    assert replayed.peak_allocated_bytes == live.peak_allocated_bytes
    assert replayed.peak_reserved_bytes == live.peak_reserved_bytes
    assert freed <= {event[1] for event in events}


@given(_SETTINGS, _DOINGS)
def test_the_oldest_segment_is_the_lowest_one_here(settings, doings):
    """With addresses that rise, torch 2.11's rule and that of 2.13 choose the same blocks."""
    if settings.expandable_segments:
        doings = [doing for doing in doings if doing[0] != "empty"]
    runs = []
    for ties in (Ties.ADDRESS, Ties.SEGMENT):
        allocator = Allocator(settings, ties=ties)
        run(allocator, doings)
        runs.append(allocator.snapshot())
    assert runs[0] == runs[1]
