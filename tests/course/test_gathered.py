"""The records of a lesson and those of the notebook in depth behind it are two things."""

import pytest

from memlab import results
from memlab.course.gathered import files_of
from tests.records import ENVIRONMENT, record, variant


def peak(file):
    (kept,) = results.load(file).records
    return kept.variants[0].peak_bytes


@pytest.mark.parametrize("in_place", [True, False])
def test_a_lesson_leaves_the_records_in_depth_as_they_are(tmp_path, monkeypatch, in_place):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    for is_lesson, kept in ((False, 1000), (True, 2000)):
        made = record("03_x", "x", [variant(peak=kept)], ENVIRONMENT)
        assert files_of(tmp_path, tmp_path, in_place)[is_lesson].add("03_x", [made]) == ""
    assert peak(tmp_path / "results/lessons/cpu.json") == 2000
    # What is not in place is of the latest run alone.
    in_depth = tmp_path / "results/cpu.json"
    assert peak(in_depth) == 1000 if in_place else not in_depth.exists()
