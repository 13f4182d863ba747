from memlab.meters.allocator import Allocator, BlockInfo, SegmentInfo
from memlab.units import MiB


def test_a_snapshot_is_plain_data():
    allocator = Allocator()
    assert allocator.snapshot() == []
    first = allocator.allocate(12 * MiB, stream=3)
    allocator.free(first)
    second = allocator.allocate(2 * MiB, stream=3)
    assert second == first
    assert allocator.snapshot() == [
        SegmentInfo(
            address=first,
            size=12 * MiB,
            stream=3,
            pool="large",
            expandable=False,
            blocks=(
                BlockInfo(first, 2 * MiB, "active_allocated"),
                BlockInfo(first + 2 * MiB, 10 * MiB, "inactive"),
            ),
        )
    ]
