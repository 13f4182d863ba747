"""`record(...)` and `claim(...)`, as a notebook calls them."""

import math
import re

import pytest

from memlab import results
from memlab.compare import compare
from memlab.ledger import COLUMNS, Block, Ledger
from memlab.measurement import Measurement
from memlab.meters.device import environment as measured_environment
from memlab.timing import Seconds
from memlab.units import MiB


def measurement(activations=3 * MiB, ledger=None, **more):
    columns = dict.fromkeys(COLUMNS, 0) | {"parameters": MiB, "activations": activations}
    more = {"environment": measured_environment("cpu"), **more}
    return Measurement(sum(columns.values()), columns, "backward", ledger or Ledger([]), **more)


def record(notebook="03_x", technique="x", **more):
    before = measurement(seconds=Seconds(0.5, 0.0123456789, 3), losses=(3.0, 2.5))
    compared = compare(before, measurement(MiB), predicted=[4 * MiB, 2 * MiB + 20972])
    more = {"scale": "cpu", "sizes": {"layers": 2}, **more}
    return results.record(compared, notebook=notebook, technique=technique, **more)


def claim(number=3, holds=True, **more):
    more = {"notebook": "03_x", "found": "It is so.", **more}
    return results.claim(number, "less memory", holds=holds, **more)


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """The file to which a notebook records."""
    path = tmp_path / "records.jsonl"
    monkeypatch.setenv(results.VARIABLE, str(path))
    return path


# record() -----------------------------------------------------------------------------------------


def test_a_record_holds_what_was_measured_and_none_for_the_rest():
    sizes = {"layers": 2, "tied": True, "share": 0.5, "kind": "gpt"}
    made = record(tokens_per_step=1000, max_gradient_difference={"after": 1e-7}, sizes=sizes)
    before, after = made.variants
    assert made.sizes == sizes and made.sizes["tied"] is True
    assert before.model_dump() == {
        "name": "before",
        "predicted_bytes": 4 * MiB,
        "peak_bytes": 4 * MiB,
        "known_bytes": None,
        "columns": dict.fromkeys(COLUMNS, 0) | {"parameters": MiB, "activations": 3 * MiB},
        "phase": "backward",
        "reserved_bytes": None,
        "device_bytes": None,
        "seconds": {"median": 0.5, "spread": 0.0123457, "repeats": 3},
        "tokens_per_second": 2000.0,
        "loss": 2.5,  # the measurement's last
        "max_gradient_difference": None,
    }
    assert list(before.columns) == list(COLUMNS)
    assert (after.seconds, after.tokens_per_second, after.loss) == (None, None, None)
    assert after.max_gradient_difference == 1e-7
    measured = made.environment.model_dump(exclude={"commit", "date"})
    assert measured == measured_environment("cpu")


def test_a_given_loss_goes_before_the_measured_one_and_none_leaves_it_out():
    assert [v.loss for v in record(loss={"before": 1.5, "after": 1.25}).variants] == [1.5, 1.25]
    assert [v.loss for v in record(loss={"before": None}).variants] == [None, None]


def test_what_was_in_tensors_is_kept_where_an_operator_took_more():
    tensor = Block(3 * MiB, 1, 0, 9, "activations")
    for scratch, known in ((True, 3 * MiB), (False, None)):
        more = Block(MiB, 2, 3, 4, "temporaries", scratch=scratch)
        measured = measurement(ledger=Ledger([tensor, more]))
        compared = compare(measured, predicted=[3 * MiB])
        made = results.record(compared, notebook="a", technique="a", sizes={}, scale="cpu")
        assert made.variants[0].known_bytes == known
        assert made.variants[0].residual == compared.variants[0].residual


def test_the_scale_is_this_devices_unless_given(monkeypatch):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    assert record(scale=None).scale == "cpu"
    assert record(scale="t4").scale == "t4"


def test_both_are_appended_to_the_file_that_the_variable_names(lines):
    made = [record(), claim(), record(notebook="04_y", technique="y")]
    assert results.read_lines(lines) == made


def test_nothing_is_written_where_no_file_is_named(lines, monkeypatch):
    monkeypatch.delenv(results.VARIABLE)
    record()
    assert results.read_lines(lines) == []


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"loss": {"befor": 1.0}}, "loss names 'befor', but the comparison has 'before', 'after'"),
        ({"max_gradient_difference": {"x": 1.0}}, "max_gradient_difference names 'x'"),
        ({"loss": {"after": math.nan}}, "variants[1].loss: Input should be a finite number"),
        ({"max_gradient_difference": {"after": -1.0}}, "max_gradient_difference: Input should be"),
        ({"tokens_per_step": 0}, "tokens_per_step has to be a positive whole number"),
        ({"tokens_per_step": 1.5}, "tokens_per_step has to be a positive whole number"),
        ({"tokens_per_step": True}, "tokens_per_step has to be a positive whole number"),
        ({"sizes": {"layers": [1]}}, "the record of '03_x': sizes.layers"),
        ({"notebook": ""}, "the record of '': notebook: String should match"),
        ({"technique": None}, "technique: Input should be a valid string, not None"),
        ({"scale": 3}, "scale: Input should be a valid string, not 3"),
    ],
)
def test_what_a_record_cannot_hold_is_refused(given, found, lines):
    with pytest.raises(ValueError, match=re.escape(found)):
        record(**given)
    assert not lines.exists()


def test_variants_of_two_devices_are_refused():
    other = measurement(environment=measured_environment("cpu") | {"device": "cuda"})
    both = compare(measurement(), other)
    with pytest.raises(ValueError, match="different devices"):
        results.record(both, notebook="a", technique="a", sizes={}, scale="cpu")


# claim() ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holds", "when", "verdict"),
    [
        (True, "", "holds"),
        (True, "it is large", "holds when it is large"),
        (False, "", "does not hold"),
    ],
)
def test_a_claim_says_its_verdict(holds, when, verdict):
    made = claim(holds=holds, when=when)
    kept = (made.notebook, made.number, made.says, made.verdict, made.found)
    assert kept == ("03_x", 3, "less memory", verdict, "It is so.")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"holds": 1}, "True or False, not 1"),
        ({"holds": False, "when": "it rains"}, "does not hold, and yet"),
        ({"number": 0}, "claim 0: number: Input should be greater than or equal to 1, not 0"),
        ({"found": " "}, "claim 3: found: String should match"),
    ],
)
def test_a_claim_that_cannot_be_kept_is_refused(wrong, found, lines):
    with pytest.raises(ValueError, match=re.escape(found)):
        claim(**wrong)
    assert not lines.exists()
