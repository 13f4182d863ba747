"""What the lessons' techniques did, in one table."""

import pytest

from memlab import results
from memlab.course import lessons_table
from memlab.course.notebook import Lesson
from memlab.units import MiB
from tests.records import GPU, pair, record, results_file, timed, variant

CARD = {
    "gpu": {"file": "nvidia-h200.json", "notebook": "03_x", "before": "before", "after": "after"}
}


@pytest.fixture
def checkout(tmp_path):
    """A lesson that ran here, and whose technique was timed on a GPU."""
    here = record(variants=pair())
    results.write(tmp_path / "results" / "lessons" / "cpu.json", results_file(here))
    there = record(variants=pair(timed(0.75)))
    results.write(tmp_path / "results" / "nvidia-h200.json", results_file(there, environment=GPU))
    return tmp_path


def lesson(root, name="03_x", **about):
    return Lesson(root / "notebooks" / f"{name}.ipynb", f"{name[:2]} · The x technique", about)


def timed_apart(root, seconds):
    file = root / "results" / "nvidia-h200.json"
    results.write(file, results_file(record(variants=pair(seconds)), environment=GPU))


def test_a_row_for_each_core_lesson(checkout):
    core = lesson(checkout, column="batch", card=CARD)
    others = [lesson(checkout, "04_y", column="kept"), lesson(checkout, "e1_z", column="kept")]
    table = lessons_table.lessons_table([core, *others], checkout, checkout)
    assert table.splitlines()[2:] == [
        "| [03 · The x technique](notebooks/03_x.ipynb) | batch | 4.00 MiB → 2.00 MiB |"
        " 4.00 MiB → 2.00 MiB | 0.5 → 0.75 | - |",
        "| [04 · The x technique](notebooks/04_y.ipynb) | kept | - | - | - | - |",
    ]


def test_seconds_that_are_no_further_apart_than_their_repeats_are_not_told_as_a_difference(
    checkout,
):
    core = lesson(checkout, column="batch", card=CARD, leave="it is small")
    timed_apart(checkout, timed(0.51, spread=0.03))
    assert "0.5 → 0.51, within the spread" in lessons_table.lessons_table(
        [core], checkout, checkout
    )
    assert "| 2.00 | - |" in lessons_table.cheat_sheet([], [core], [core], checkout, checkout)


def test_the_cheat_sheet_has_a_row_for_each_notebook_with_words(checkout):
    words = {"exact": "yes", "leave": "the batch is small", "column": "optimizer_state"}
    in_depth = [lesson(checkout, **words), lesson(checkout, "05_z", column="batch")]
    files = results.load_all(checkout)
    row = "| [The x technique](notebooks/03_x.ipynb) | optimizer state | 2.00 | {} | yes | the {}"
    sheet = lessons_table.cheat_sheet(files, in_depth, [], checkout, checkout)
    assert sheet.splitlines()[2:] == [row.format("-", "batch is small |")]
    short = [lesson(checkout, column="optimizer_state", card=CARD)]
    sheet = lessons_table.cheat_sheet(files, in_depth, short, checkout, checkout)
    assert sheet.splitlines()[2:] == [row.format("1.50", "batch is small |")]
    inside = lessons_table.cheat_sheet(files, in_depth, [], checkout, checkout / "results")
    assert "(../notebooks/03_x.ipynb)" in inside
    assert "| - | - | yes |" in lessons_table.cheat_sheet([], in_depth, [], checkout, checkout)


def test_the_three_factors_are_those_of_the_capstone(checkout):
    assert lessons_table.three_factors(checkout) == ""
    naive = variant(lessons_table.NAIVE, 120 * MiB, seconds=timed(1.0), device_bytes=160 * MiB)
    careful = variant(lessons_table.CAREFUL, 60 * MiB, seconds=timed(0.25))
    pieces = variant(lessons_table.PIECES, 12 * MiB, seconds=timed(0.5))
    smallest = variant(lessons_table.SMALLEST, 4 * MiB, device_bytes=10 * MiB)
    records = [
        record("11_capstone", variants=[naive, careful, smallest]),
        record("11_capstone", "pieces", variants=[naive, pieces]),
    ]
    file = checkout / "results" / lessons_table.LARGE
    results.write(file, results_file(*records, environment=GPU))
    said = lessons_table.three_factors(checkout)
    assert "**10× less** than the naive loop in 0.50 of its time" in said
    assert "it is 5× less at 2.0 times the time" in said
    assert "the smallest recipe is 16× less than the naive loop" in said
