"""The H100's records predicted again."""

from pathlib import Path

import pytest

from memlab import results
from memlab.course import validate

ROOT = Path(__file__).resolve().parents[2]
FOUND = results.load_predictions(ROOT)


def test_every_variant_is_predicted_or_listed_with_a_reason():
    places = {(p.file, p.record, p.variant): p for p in (*FOUND.rows, *FOUND.not_predicted)}
    assert len(places) == len(FOUND.rows) + len(FOUND.not_predicted)
    for file in validate.FILES:
        for number, record in enumerate(results.load(ROOT / "results" / file).records):
            for variant in record.variants:
                place = places.pop((file, number, variant.name))
                assert place.notebook == record.notebook
                if isinstance(place, results.Left):
                    continue
                assert place.allocated.measured == variant.peak_bytes
                if place.reserved is None:
                    assert place.why_not
                else:
                    assert place.reserved.measured == variant.reserved_bytes
    assert not places


@pytest.mark.slow
def test_some_variants_predicted_again_are_as_in_the_file():
    asked = [
        row
        for row in FOUND.rows
        if row.file == validate.FILES[0]
        and (row.notebook, row.variant)
        in {
            ("00_measuring_memory", "two layers"),
            ("07_in_place", "denoiser, LeakyReLU"),
            ("07_in_place", "gated MLP, inference"),
        }
    ]
    assert len(asked) == 3
    for row in asked:
        key = row.record, row.variant
        found = validate.predict_notebook(ROOT, row.file, row.notebook, {key})
        assert found[key]["allocated"] == row.allocated.predicted
        if row.reserved is not None:
            assert found[key]["reserved"] == row.reserved.predicted
