"""What a record, a claim and a results file may hold."""

import copy
import json
import math
import re
from pathlib import Path

import pytest

from memlab.results import Claim, Record, Results
from memlab.units import MiB
from tests.records import ENVIRONMENT, claim, pair, record, results_file, timed, variant

COMMITTED = sorted((Path(__file__).resolve().parents[2] / "results").glob("*[!s].json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_file_is_read_and_written_to_the_byte(path):
    text = path.read_text(encoding="utf-8")
    data = Results.from_json(text)
    assert data.records and data.to_json() == text


def test_a_file_is_read_as_it_was_written_whatever_the_order_of_its_keys():
    data = results_file(record(), record("04_y", "y"), claim())
    text = data.to_json()
    assert text.endswith("}\n") and Results.from_json(text) == data
    shuffled = json.dumps(json.loads(text), sort_keys=True)
    assert Results.from_json(shuffled).to_json() == text


def test_a_record_says_in_the_file_only_how_its_environment_differs():
    older = ENVIRONMENT.model_copy(update={"date": "2025-12-01", "gpu": "T4"})
    data = results_file(record(), record("04_y", environment=older), claim(environment=older))
    plain, differing = (json.loads(data.to_json())[kind] for kind in ("records", "claims"))
    assert [kept.get("environment") for kept in plain + differing] == [
        None,
        {"gpu": "T4", "date": "2025-12-01"},
        {"gpu": "T4", "date": "2025-12-01"},
    ]
    assert Results.from_json(data.to_json()).records[1].environment == older


def test_a_record_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        record().technique = "another"


# In numbers and words -----------------------------------------------------------------------------


def test_a_variant_says_what_was_gained_and_what_the_prediction_missed():
    before, after = pair(after_seconds=timed(0.75))
    assert after.times_less(before) == 2 and after.times_time(before) == 1.5
    assert before.residual == 0 and after.residual == -20972 / (2 * MiB + 20972)
    assert variant().residual is None
    with_more = variant(peak=5 * MiB, predicted=4 * MiB, known_bytes=4 * MiB)
    assert with_more.residual == 0


def test_what_an_operator_took_for_itself_is_in_the_file_where_there_was_any():
    data = results_file(record(variants=[variant(known_bytes=MiB), variant("without")]))
    first, second = json.loads(data.to_json())["records"][0]["variants"]
    assert first["known_bytes"] == MiB and "known_bytes" not in second
    assert Results.from_json(data.to_json()) == data


@pytest.mark.parametrize(
    ("seconds", "factor"), [(None, None), (timed(1.0, 0.5), 2.0), (timed(1.0, 0.51), None)]
)
def test_no_times_are_compared_where_the_machine_was_busy_or_nothing_was_timed(seconds, factor):
    before, after = pair(after_seconds=seconds)
    assert after.times_time(before) == factor
    if seconds:
        assert before.times_time(after) == (factor and 1 / factor)


class Printer:
    said = ""

    def text(self, text):
        self.said += text


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        (record(), "recorded: 2 variants of x"),
        (record(variants=pair()[:1]), "recorded: 1 variant of x"),
        (claim(), "Claim 3: less memory\nVerdict: holds.\nIt is so."),
    ],
)
def test_a_notebook_shows_them_as_text(shown, said):
    printer = Printer()
    shown._repr_pretty_(printer, cycle=False)
    assert printer.said == said


# What is refused ----------------------------------------------------------------------------------


def _environment(**changes):
    return lambda data: data["environment"].update(changes)


def _record(**changes):
    return lambda data: data["records"][0].update(changes)


def _variant(**changes):
    return lambda data: data["records"][0]["variants"][1].update(changes)


PLACE = "records[0].variants[1]"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda d: d.update(schema=3), "its schema is version 3; this memlab reads up to 2"),
        (lambda d: d.pop("schema"), "its schema is version None"),
        (lambda d: d.pop("records"), "records: Field required"),
        (lambda d: d.update(records={}), "records: Input should be a valid list"),
        (lambda d: d.update(note="x"), "note: Extra inputs are not permitted"),
        (lambda d: d.update(environment=3), "environment: Input should be"),
        (lambda d: d["environment"].pop("commit"), "environment.commit: Field required"),
        (_environment(date="yesterday"), "environment.date: String should match"),
        (_environment(device="tpu"), "environment.device: Input should be 'cpu' or 'cuda'"),
        (_environment(threads=True), "environment.threads: Input should be a valid integer"),
        (lambda d: d["records"].append(3), "records[1]: Input should be"),
        (lambda d: d["records"][0].pop("sizes"), "records[0].sizes: Field required"),
        (_record(notebook=" "), "records[0].notebook: String should match"),
        (_record(variants=[]), "records[0].variants: List should have at least 1 item"),
        (_record(environment={"x": 1}), "records[0].environment.x: Extra inputs"),
        (_record(sizes={"layers": [1]}), "records[0].sizes.layers"),
        (_record(sizes={"layers": math.nan}), "records[0].sizes.layers"),
        (_variant(name="before"), "records[0].variants: two variants have one name: 'before'"),
        (_variant(peak_bytes=1), f"{PLACE}: the columns sum to 2097152, but peak_bytes is 1"),
        (_variant(peak_bytes="12 MiB"), f"{PLACE}.peak_bytes: Input should be a valid integer"),
        (_variant(peak_bytes=2.0 * MiB), f"{PLACE}.peak_bytes: Input should be a valid integer"),
        (_variant(reserved_bytes=0), f"{PLACE}.reserved_bytes: Input should be greater than or"),
        (_variant(phase="lunch"), f"{PLACE}.phase: a phase is one of forward, backward"),
        (_variant(loss=math.inf), f"{PLACE}.loss: Input should be a finite number, not inf"),
        (_variant(max_gradient_difference=-1.0), f"{PLACE}.max_gradient_difference"),
        (_variant(seconds={"median": 1.0, "spread": 0.0}), f"{PLACE}.seconds.repeats: Field"),
        (_variant(columns={"parameters": 2 * MiB}), f"{PLACE}.columns: the columns have to be"),
        (
            lambda d: d["records"][0]["variants"][0]["columns"].update(parameters=-1),
            "records[0].variants[0].columns.parameters: Input should be greater",
        ),
        (lambda d: d["claims"][0].update(verdict="perhaps"), "claims[0].verdict: String should"),
        (lambda d: d["claims"][0].update(number=0), "claims[0].number: Input should be greater"),
    ],
)
def test_a_file_of_another_form_is_refused(change, found):
    good = json.loads(results_file(record(), claim()).to_json())
    Results.from_json(json.dumps(good))
    wrong = copy.deepcopy(good)
    change(wrong)
    with pytest.raises(ValueError, match=f"^{re.escape(found)}"):
        Results.from_json(json.dumps(wrong))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_what_is_no_results_file_at_all_is_refused(text):
    with pytest.raises(ValueError):
        Results.from_json(text)


def test_the_two_kinds_are_not_taken_for_one_another():
    for kind, other in ((Record, claim()), (Claim, record())):
        with pytest.raises(ValueError):
            kind.model_validate_json(other.model_dump_json())
