import pytest

from memlab.meters.allocator import Allocator, OutOfMemory, Settings
from memlab.units import MiB


def test_the_error_says_what_pytorchs_own_says():
    allocator = Allocator(limit=64 * MiB)
    allocator.allocate(30 * MiB)
    allocator.allocate(1000)
    with pytest.raises(OutOfMemory) as caught:
        allocator.allocate(40 * MiB - 5)
    error = caught.value
    assert (error.asked, error.tried) == (40 * MiB - 5, 40 * MiB)
    assert (error.allocated, error.reserved) == (30 * MiB + 1024, 32 * MiB)
    assert (error.limit, error.free, error.cached) == (64 * MiB, 32 * MiB, 2 * MiB - 1024)
    assert str(error) == (
        "CUDA out of memory (simulated). Tried to allocate 40.00 MiB. The GPU has a total capacity"
        " of 64.00 MiB of which 32.00 MiB is free. Of the allocated memory 30.00 MiB is allocated"
        " by PyTorch, and 2.00 MiB is reserved by PyTorch but unallocated. If reserved but"
        " unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to"
        " avoid fragmentation."
    )


def test_what_is_set_already_is_not_advised():
    allocator = Allocator(Settings(expandable_segments=True), limit=64 * MiB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.allocate(70 * MiB)
    assert "expandable" not in str(caught.value)


def test_less_may_be_allowed_than_there_is():
    allocator = Allocator(limit=64 * MiB, allowed=32 * MiB)
    allocator.allocate(20 * MiB)
    with pytest.raises(OutOfMemory, match="32.00 MiB allowed;") as caught:
        allocator.allocate(20 * MiB)
    assert caught.value.allowed == 32 * MiB
    allocator.allocate(12 * MiB)
