"""The table of watched loops."""

from memlab.course.watched import NOTHING, watched_table
from tests.results.test_watched import watched


def test_a_row_a_loop_and_whose_times_they_are():
    assert watched_table([]) == NOTHING
    words, _, table = watched_table([watched(), watched(steps=10_000)]).partition("\n\n")
    assert "times are those of the machine" in words
    first, second = table.splitlines()[2:]
    assert first.startswith("| 8 layers of 64, batch 64 | 1,000 | 2.00 | 3.00 | 1.50 | 0.50 | 1.00")
    assert "| 1.00 MiB | 30 |" in first and "| 10,000 |" in second
