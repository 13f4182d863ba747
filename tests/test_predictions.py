"""The H100's records predicted again: `results/predictions.json`, its table, how it is made."""

import ast
import json
from pathlib import Path

import pytest

from memlab import results
from memlab.course import documents, validate
from memlab.course.on_device import leaves_on_device
from memlab.course.predicted import in_words, predictions_table
from memlab.course.slices import statements_for_records

ROOT = Path(__file__).resolve().parents[1]
FOUND = results.load_predictions(ROOT)


def notebook(*cells):
    return {"cells": [{"cell_type": "code", "source": [cell]} for cell in cells]}


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


def test_misses_are_explained():
    for row in FOUND.rows:
        far = abs(row.allocated.residual) > 0.01
        far |= row.reserved is not None and abs(row.reserved.residual) > 0.05
        assert row.reason or not far, (row.notebook, row.variant)


def test_the_table_in_the_results_is_of_these_predictions():
    readme = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    begin, end = (f"<!-- memlab:predictions:{edge} -->" for edge in ("begin", "end"))
    assert readme.split(begin)[1].split(end)[0].strip() == predictions_table(FOUND)
    assert "predictions" in documents.DOCUMENTS["results/README.md"]
    assert in_words(FOUND.allocated) in readme and in_words(FOUND.reserved) in readme


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


# What of a notebook leads to its records ----------------------------------------------------------


def test_only_what_leads_to_a_record_is_run_again():
    statements = statements_for_records(
        notebook(
            "%pip install memlab\nfrom memlab import compare, measure, results\nimport math",
            "def build(size):\n    return lambda: factor * size\n",
            "unused = measure(build(1))\nfactor = 2\nruns = {}",
            "for size in (1, 2):\n    runs[size] = measure(build(size))\n    print(runs[size])",
            "gap = math.pi\nassert runs",
            "results.record(compare(*runs.values(), predicted=[gap]), loss={'a': gap})",
        )
    )
    assert [ast.unparse(each) for each in statements] == [
        "from memlab import compare, measure, results",
        "def build(size):\n    return lambda: factor * size",
        "factor = 2",
        "runs = {}",
        "for size in (1, 2):\n    runs[size] = measure(build(size))",
        "results.record(compare(*runs.values()))",
    ]


def test_the_value_before_is_the_one_that_is_used():
    statements = statements_for_records(
        notebook("a = 1", "a = 2", "b = [a]", "b.append(3)", "a = 4", "results.record(b)", "b = 5")
    )
    assert [ast.unparse(each) for each in statements] == [
        "a = 2",
        "b = [a]",
        "b.append(3)",
        "results.record(b)",
    ]


def test_what_lives_on_the_device_between_which_lines():
    found = leaves_on_device(
        notebook(
            "x = torch.ones(3, device=here.device)\nname = here.device.type",
            "def build():\n    inside = torch.ones(3, device=here.device)",
            "del x\nstep = proof.first_step(build)\ngap = proof.gradient_difference(step, step)",
        )
    )
    assert found == [("x", 1, 5), ("step", 6, float("inf"))]
