"""Why predictions are off."""

from pathlib import Path

from memlab import results

ROOT = Path(__file__).resolve().parents[2]
FOUND = results.load_predictions(ROOT)


def test_misses_are_explained():
    for row in FOUND.rows:
        far = abs(row.allocated.residual) > 0.01
        far |= row.reserved is not None and abs(row.reserved.residual) > 0.05
        assert row.reason or not far, (row.notebook, row.variant)
