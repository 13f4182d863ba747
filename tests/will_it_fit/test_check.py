"""The lesson's checks: a guess, an estimate, and the fewest switches."""

import pytest

from memlab import exercises
from memlab.units import GiB
from memlab.will_it_fit.check import check_estimate, check_switches, guess
from tests.will_it_fit.made_up import TABLE, exercise


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "You have not guessed yet"),
        (1.9, "You guessed 1.9 GiB; predicted 2.00 GiB: -5%, close."),
        (4, "predicted 2.00 GiB: +100%, see below"),
    ],
)
def test_a_guess_is_answered(capsys, given, words):
    guess(given, 2 * GiB)
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("off", "passed", "line"), [(1.1, True, "Solved"), (1.2, False, "Not all are within 15%")]
)
def test_an_estimate_has_to_come_near_every_prediction(off, passed, line):
    right = {(row.options.model, row.options.lora): row.allocated_bytes for row in TABLE.rows[:3]}

    def estimate(sizes, lora, tokens):
        assert tokens == 1024
        factor = off if sizes.name == "GPT-2 124M" else 1
        return factor * right[sizes.name, lora]

    result = check_estimate(estimate, TABLE)
    assert result.passed == passed and result.lines[0].startswith(line)
    assert len(result.lines) == 4 and result is exercises.history[-1]


@pytest.mark.parametrize("unsolved", [None, lambda *_: None, lambda *_: ...])
def test_without_an_estimate_there_is_nothing_to_check(unsolved):
    assert str(check_estimate(unsolved, TABLE)).startswith("Not solved yet: 3 predictions")


@pytest.mark.parametrize(
    ("switches", "passed", "line"),
    [
        ([], False, "Not solved yet: Llama-3.1 8B does not fit"),
        (None, False, "Not solved yet"),
        (["lora"], False, "Not yet: it does not fit"),
        (
            ["fused_loss", "lora", "lora"],
            True,
            "Solved: it fits NVIDIA GeForce RTX 4090: 21.00 GiB",
        ),
    ],
)
def test_the_fewest_switches_that_fit(switches, passed, line):
    result = check_switches(switches, TABLE)
    assert result.passed == passed and result.lines[0].startswith(line)
    assert result is exercises.history[-1] and result.ledgers["no switch"]
    bars = [label.get_text() for label in result.plot().axes[0].get_yticklabels()]
    assert bars == (["no switch", "yours"] if switches else ["no switch"])


def test_a_switch_too_many_is_noticed_and_what_is_not_kept_is_predicted():
    asked = []

    def predict_row(options):
        asked.append(options.switches)
        return exercise(15, *options.switches)

    result = check_switches(["lora", "checkpoints", "fused_loss"], TABLE, predict_row)
    assert asked == [("lora", "checkpoints", "fused_loss")]
    assert not result.passed and "2 switches are enough" in str(result)


def test_an_unknown_switch_is_refused():
    with pytest.raises(ValueError, match="no switch 'flash'. There are: lora, checkpoints"):
        check_switches(["flash"], TABLE)
