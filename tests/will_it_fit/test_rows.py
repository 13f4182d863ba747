"""The predictions that are kept: today's code makes the same, and the file reads as it writes."""

import pytest

from memlab.units import GiB
from memlab.will_it_fit import rows
from tests.will_it_fit.made_up import TABLE, exercise, row


def test_the_file_has_what_the_lesson_shows():
    kept = rows.load().rows
    assert [row.options for row in kept] == rows.kept_options()
    assert {row.options.model for row in kept} <= set(rows.MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_prediction_of_today_equals_the_one_that_is_kept(lora):
    """If not: python tools/will_it_fit.py --all, and the notebook e8 has to be run again."""
    for package in ("transformers", "peft"):
        pytest.importorskip(package)
    kept = rows.load().find(model="GPT-2 124M", checkpoints=True, lora=lora)
    found = rows.predict_row(kept.options)
    # Two scalars that a library keeps for the process are there in its first prediction alone.
    for prediction in (found, kept):
        prediction.columns.pop("kept", None)
    assert found == kept


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "rows.json"
    rows.write(TABLE, path)
    assert rows.load(path) == TABLE
    assert len(path.read_text().splitlines()) == len(TABLE.rows) + 2


def test_a_row_says_whether_it_fits_and_by_how_much():
    fit = row(20).fits("RTX 4090")
    assert fit and fit.gpu == "NVIDIA GeForce RTX 4090" and fit.needed_bytes == 21 * GiB
    assert not row(40).fits("RTX 4090")
    assert fit.reserved_bytes < fit.needed_bytes  # the rest is the context


def test_rows_are_found_by_all_their_options():
    found = TABLE.find(model="Llama-3.1 8B", sequence=4096, lora=True)
    assert found == exercise(30, "lora") and found.options.switches == ("lora",)
    assert TABLE.find(model="Llama-3.1 8B", lora=True) is None
    assert TABLE.with_model("Llama-3.1 8B", sequence=4096) == list(TABLE.rows[3:])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"parameters":2147483648', '"parameters":-1', "greater than or equal to 0"),
        ('"date":"2026-11-30"', '"date":"today"', "date"),
        ('"batch":1', '"rows":1', "rows"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path, old, new, words):
    path = tmp_path / "rows.json"
    rows.write(TABLE, path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=f"rows.json is not a file of predictions: .*{words}"):
        rows.load(path)
