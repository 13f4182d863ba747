"""The form of the predictions of the H100's records."""

import json
from pathlib import Path

import pytest

from memlab import results

ROOT = Path(__file__).resolve().parents[2]
FOUND = results.load_predictions(ROOT)


def test_a_summary_that_does_not_follow_from_the_rows_is_refused(tmp_path):
    results.write_predictions(tmp_path, FOUND)
    file = tmp_path / "results" / results.PREDICTIONS
    assert results.load_predictions(tmp_path) == FOUND
    data = json.loads(file.read_text())
    data["allocated"]["median"] += 1
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="the summary of allocated does not follow"):
        results.load_predictions(tmp_path)
    file.write_text(json.dumps(data | {"schema": 0}))
    with pytest.raises(ValueError, match="make validate writes it anew"):
        results.load_predictions(tmp_path)


def test_a_summary_counts_sizes_and_those_that_were_too_low():
    pairs = [(100, 100 + missed) for missed in range(-10, 10)]
    found = results.summary_of(results.Bytes(predicted=p, measured=m) for p, m in pairs)
    assert (found.rows, found.median, found.p95, found.worst) == (20, 0.05, 0.09, 0.1)
    assert found.underestimates == 9
    assert results.summary_of([None]) is None
