"""What is predicted for the lessons' cards, kept in one file."""

import pytest

from memlab.results.lessons import (
    PREDICTED,
    PredictedCard,
    PredictedRun,
    keep_card,
    load_cards,
)


def run(peak, needed):
    return PredictedRun(
        peak_bytes=peak, needed_bytes={"24 GB": needed}, columns={"activations": 1}, phase="forward"
    )


def card(name="03_x", peak=5):
    return PredictedCard(
        notebook=name,
        what="a model",
        before=run(9, 24),
        after=run(peak, 6),
        free_bytes={"24 GB": 23},
        torch="2.13.0",
        date="2026-11-30",
    )


def test_a_card_takes_the_place_of_the_one_before_it(tmp_path):
    assert load_cards(tmp_path) == {}
    for kept in (card(), card("00_a"), card(peak=4)):
        assert keep_card(tmp_path, kept) == tmp_path / PREDICTED
    assert load_cards(tmp_path) == {"00_a": card("00_a"), "03_x": card(peak=4)}


def test_a_run_fits_what_is_free():
    assert [card().fits(each, "24 GB") for each in (card().before, card().after)] == [False, True]


def test_a_file_that_is_not_valid_is_said(tmp_path):
    keep_card(tmp_path, card())
    path = tmp_path / PREDICTED
    path.write_text(path.read_text().replace('"2026-11-30"', '"today"'))
    with pytest.raises(ValueError, match=r"predicted.json: cards\[0\].date"):
        load_cards(tmp_path)
