"""The buffer of a reduction that is split over blocks: PyTorch's formula, by hand, as measured."""

from math import ceil

import pytest

from memlab.meters.cuda_reduction import staging_bytes
from memlab.meters.scratch import Processors
from memlab.units import MiB

H100 = Processors(132, 2048)
T4 = Processors(40, 1024)


def over_rows(rows, columns, processors=H100, offset=0):
    return staging_bytes((rows, columns), (columns, 1), offset, frozenset([0]), 4, 4, processors)


# The bias gradient's sum over rows of 3,072 numbers, as the allocator's history of an H100 had it.
@pytest.mark.parametrize(
    ("rows", "size"),
    [(1_024, 24 * MiB), (2_048, 48 * MiB), (4_096, 96 * MiB), (8_192, 132 * MiB)],
)
def test_a_sum_over_rows_takes_what_was_measured(rows, size):
    assert over_rows(rows, 3_072)[0][0] == size


def test_a_sum_over_few_rows_or_many_columns_takes_nothing():
    assert over_rows(512, 3_072) == over_rows(8_192, 50_257) == over_rows(0, 3_072) == ()


def test_a_sum_over_rows_by_hand():
    # 32 x 4 threads for 4 columns each: 6 blocks side by side. A thread would add up 2,048 rows,
    # so 128 blocks share them, 16 rows each: 4 bytes x 768 columns x 128 blocks, and once more
    # times 32 x 4.
    size, semaphores = over_rows(8_192, 768)[0]
    assert size == 4 * 768 * 128 * 32 * 4 == 48 * MiB and semaphores == 4 * 6
    # A beginning that 16 bytes do not divide: one column at a time, 24 blocks of 32 columns.
    assert over_rows(8_192, 768, offset=1)[0][1] == 4 * 24
    assert over_rows(8_192, 3_072, T4)[0][0] == 21 * MiB


def test_a_sum_of_everything_is_split_over_blocks():
    # 512 threads: 8,192 x 50,257 / 512 values each, so 528 blocks (the most at once) are too few
    # for 256 values each.
    numbers = 8_192 * 50_257
    found = staging_bytes((8_192, 50_257), (50_257, 1), 0, frozenset([0, 1]), 4, 4, H100)
    assert found == ((4 * ceil(ceil(numbers / 512) / 256), 4),)


def test_beyond_32_bits_a_sum_runs_in_parts():
    found = staging_bytes((2**17, 2**15), (2**15, 1), 0, frozenset([0]), 4, 4, H100)
    assert len(found) == 8  # 16 GiB; each part's last number begins within 2^31 - 1 bytes
    assert len({size for size, _ in found}) == 1
