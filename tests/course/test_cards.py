"""A lesson's card is made of records, and says what was measured and what was predicted."""

from pathlib import Path

import pytest

from memlab import results
from memlab.course import cards
from memlab.course.notebook import Lesson
from memlab.results.lessons import keep_card
from memlab.units import MiB
from tests.records import GPU, record, results_file, timed, variant
from tests.results.test_lessons import card as predicted

ABOUT_GPU = {"file": "gpu.json", "notebook": "11_y", "before": "a", "after": "b", "what": "GPT-2"}


def lesson(**about):
    return Lesson(Path("notebooks/03_x.ipynb"), "03", about)


@pytest.fixture
def root(tmp_path):
    sizes = {"model": "a small GPT", "batch": 4, "sequence": 1024}
    here = record("03_x", "x", [variant(peak=4 * MiB), variant("after", MiB)], sizes=sizes)
    results.write(tmp_path / "results/lessons/cpu.json", results_file(here))
    names = [variant("a", 6 * MiB, seconds=timed(1.0)), variant("b", 2 * MiB, seconds=timed(1.5))]
    on_gpu = record("11_y", "y", names, GPU)
    results.write(tmp_path / "results/gpu.json", results_file(on_gpu, environment=GPU))
    return tmp_path


def rows(card):
    return [line.split(" | ") for line in card.splitlines()[2:]]


def test_a_card_has_a_row_for_each_record(root):
    (here,) = rows(cards.card(lesson(), root))
    assert here[0].startswith("| **measured** here (CPU, ")
    assert here[1:5] == ["a small GPT, 4 × 1,024 tokens", "4.00 MiB", "1.00 MiB", "4.0"]

    keep_card(root, predicted())
    here, on_gpu, large = rows(cards.card(lesson(card={"gpu": ABOUT_GPU}), root))
    assert on_gpu[0].startswith(f"| **measured** on a GPU ({GPU.gpu}, ")
    assert on_gpu[2:5] == ["6.00 MiB", "2.00 MiB", "3.0"]
    assert on_gpu[5].startswith("1 s (± 0.01) → 1.5 s (± 0.01)")
    assert large[0].startswith("| **predicted** (no GPU used")


def test_a_record_that_is_not_there_is_said(root):
    about = ABOUT_GPU | {"after": "c"}
    with pytest.raises(ValueError, match=r"gpu.json has no record of 11_y with 'a' and 'c'"):
        cards.card(lesson(card={"gpu": about}), root)


def test_what_three_meters_say(root):
    about = ABOUT_GPU | {"variants": ["a", "b"]}
    first, second = rows(cards.three_numbers(lesson(three_numbers=about), root))
    assert first[:2] == ["| a", "6.00 MiB"] and second[:2] == ["| b", "2.00 MiB"]


def test_a_card_is_predicted_with_the_options_that_the_lesson_names():
    about = {
        "what": "GPT-2",
        "options": {"model": "GPT-2 124M", "sequence": 512},
        "before": {},
        "after": {"checkpoints": True},
    }
    found = cards.predict_card(lesson(card={"predicted": about}), layers=2)
    assert found.notebook == "03_x" and set(found.free_bytes) == set(cards.GPUS)
    assert found.after.columns["activations"] < found.before.columns["activations"]
    assert found.fits(found.before, "24 GB")
