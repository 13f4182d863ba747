"""Records, claims and the files that hold them."""

import copy
import json
import math
import re
import subprocess

import pytest

from memlab import results
from memlab.compare import compare
from memlab.ledger import COLUMNS, Ledger
from memlab.measurement import Measurement
from memlab.meters.device import environment as measured_environment
from memlab.timing import Seconds
from memlab.units import MiB


def measurement(parameters=MiB, activations=3 * MiB, **more):
    columns = dict.fromkeys(COLUMNS, 0) | {"parameters": parameters, "activations": activations}
    more = {"environment": measured_environment("cpu"), **more}
    return Measurement(sum(columns.values()), columns, "backward", Ledger([]), **more)


def comparison(**more):
    before = measurement(seconds=Seconds(0.5, 0.0123456789, 3), losses=(3.0, 2.5), **more)
    return compare(
        before, measurement(activations=MiB, **more), predicted=[4 * MiB, 2 * MiB + 20972]
    )


def record(notebook="03_x", technique="x", sizes=None, **more):
    more = {"scale": "cpu", **more}
    return results.record(
        comparison(), notebook=notebook, technique=technique, sizes=sizes or {"layers": 2}, **more
    )


ENVIRONMENT = {
    "device": "cpu",
    "gpu": None,
    "gpu_bytes": None,
    "torch": "2.13.0",
    "driver": None,
    "python": "3.11.7",
    "threads": 2,
    "commit": "0" * 40,
    "date": "2026-01-31",
}
GPU = ENVIRONMENT | {
    "device": "cuda",
    "gpu": "NVIDIA H200",
    "gpu_bytes": 140 * 2**30,
    "driver": "575.1",
}


def lines(*records, **environment):
    return [{"environment": ENVIRONMENT | environment, "record": one} for one in records]


def results_file(*records, environment=ENVIRONMENT):
    return {"schema": results.SCHEMA, "environment": dict(environment), "records": list(records)}


# record() -----------------------------------------------------------------------------------------


def test_a_record_holds_what_was_measured_and_null_for_the_rest():
    made = record(
        tokens_per_step=1000,
        max_gradient_difference={"after": 1e-7},
        sizes={"layers": 2, "tied": True},
    )
    before, after = made["variants"]
    assert list(made) == ["notebook", "technique", "scale", "sizes", "variants"]
    assert made["sizes"] == {"layers": 2, "tied": True}
    assert before == {
        "name": "before",
        "predicted_bytes": 4 * MiB,
        "peak_bytes": 4 * MiB,
        "columns": dict.fromkeys(COLUMNS, 0) | {"parameters": MiB, "activations": 3 * MiB},
        "phase": "backward",
        "reserved_bytes": None,
        "device_bytes": None,
        "seconds": {"median": 0.5, "spread": 0.0123457, "repeats": 3},
        "tokens_per_second": 2000.0,
        "loss": 2.5,  # the measurement's last
        "max_gradient_difference": None,
    }
    assert list(before["columns"]) == list(COLUMNS)
    assert (after["seconds"], after["tokens_per_second"], after["loss"]) == (None, None, None)
    assert after["max_gradient_difference"] == 1e-7
    assert json.loads(json.dumps(made)) == made


def test_a_given_loss_goes_before_the_measured_one_and_none_leaves_it_out():
    assert [v["loss"] for v in record(loss={"before": 1.5, "after": 1.25})["variants"]] == [
        1.5,
        1.25,
    ]
    assert [v["loss"] for v in record(loss={"before": None})["variants"]] == [None, None]


def test_the_scale_is_this_devices_unless_given(monkeypatch):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    assert record(scale=None)["scale"] == "cpu"
    assert record(scale="t4")["scale"] == "t4"


def test_records_are_appended_to_the_file_that_the_variable_names(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    monkeypatch.delenv(results.VARIABLE, raising=False)
    record()
    assert results.read_lines(path) == []
    monkeypatch.setenv(results.VARIABLE, str(path))
    made = [record(), record(notebook="04_y", technique="y")]
    assert [line["record"] for line in results.read_lines(path)] == made
    assert results.read_lines(path)[0]["environment"] == measured_environment("cpu")


def test_a_notebook_shows_a_record_as_one_line():
    pretty = pytest.importorskip("IPython.lib.pretty").pretty
    assert pretty(record()) == "recorded: 2 variants of x"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"loss": {"befor": 1.0}}, "loss names 'befor', but the comparison has 'before', 'after'"),
        ({"max_gradient_difference": {"x": 1.0}}, "max_gradient_difference names 'x'"),
        ({"loss": {"after": math.nan}}, "loss has to be a finite number, or null, not nan"),
        ({"max_gradient_difference": {"after": -1.0}}, "max_gradient_difference has to be"),
        ({"tokens_per_step": 0}, "tokens_per_step has to be a positive whole number"),
        ({"tokens_per_step": 1.5}, "tokens_per_step has to be a positive whole number"),
        (
            {"sizes": {"layers": [1]}},
            "sizes.layers has to be a text, a finite number, true or false",
        ),
        ({"notebook": ""}, "notebook has to be a text"),
        ({"technique": None}, "technique has to be a text"),
        ({"scale": 3}, "scale has to be a text"),
    ],
)
def test_what_a_record_cannot_hold_is_refused(given, found, tmp_path, monkeypatch):
    monkeypatch.setenv(results.VARIABLE, str(tmp_path / "records.jsonl"))
    with pytest.raises(ValueError, match=re.escape(found)):
        record(**given)
    assert not (tmp_path / "records.jsonl").exists()


def test_variants_of_two_devices_are_refused():
    other = measurement(environment=measured_environment("cpu") | {"device": "cuda"})
    with pytest.raises(ValueError, match="different devices"):
        results.record(
            compare(measurement(), other), notebook="a", technique="a", sizes={}, scale="cpu"
        )


# The file -----------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written_with_its_keys_in_one_order(tmp_path):
    data = results_file(record(), record(notebook="04_y", technique="y"))
    path = tmp_path / "results" / "cpu.json"
    results.write(path, data)
    assert results.load(path) == data
    first = path.read_bytes()
    assert first.endswith(b"}\n") and b"\r" not in first
    shuffled = json.loads(json.dumps(data, sort_keys=True))
    results.write(path, shuffled)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]  # nothing partial is left


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "cpu.json"
    results.write(path, results_file(record()))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="environment has no 'torch'"):
        results.write(
            path, results_file(environment={k: v for k, v in ENVIRONMENT.items() if k != "torch"})
        )
    assert path.read_bytes() == before


def _variant(**changes):
    return lambda data: data["records"][0]["variants"][1].update(changes)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda d: d.update(schema=2), "its schema is version 2; this memlab reads version 1"),
        (lambda d: d.pop("schema"), "its schema is version None"),
        (lambda d: d.pop("records"), "the file has no 'records'"),
        (lambda d: d.update(records={}), "the file.records has to be a list"),
        (lambda d: d.update(note="x"), "fields that the schema does not know: 'note'"),
        (lambda d: d["environment"].pop("commit"), "environment has no 'commit'"),
        (lambda d: d["environment"].update(date="yesterday"), "environment.date has to be a date"),
        (
            lambda d: d["environment"].update(device="tpu"),
            'environment.device has to be "cpu" or "cuda"',
        ),
        (
            lambda d: d["environment"].update(threads=True),
            "environment.threads has to be a whole number",
        ),
        (lambda d: d["records"].append(3), "records[1] has to be an object, not 3"),
        (lambda d: d["records"][0].pop("sizes"), "records[0] has no 'sizes'"),
        (lambda d: d["records"][0].update(variants=[]), "at least one variant"),
        (
            lambda d: d["records"][0].update(environment={"x": 1}),
            "records[0].environment has fields",
        ),
        (_variant(name="before"), "records[0]: two variants have one name"),
        (
            _variant(peak_bytes=1),
            "records[0].variants[1]: the columns sum to 2097152, but peak_bytes is 1",
        ),
        (
            _variant(peak_bytes="12 MiB"),
            "records[0].variants[1].peak_bytes has to be a whole number",
        ),
        (_variant(peak_bytes=2.0 * MiB), "peak_bytes has to be a whole number"),
        (
            _variant(reserved_bytes=0),
            "reserved_bytes has to be a whole number of at least 1, or null, not 0",
        ),
        (_variant(phase="lunch"), "phase has to be one of forward, backward, optimizer, other"),
        (_variant(loss=math.inf), "loss has to be a finite number"),
        (_variant(seconds={"median": 1.0, "spread": 0.0}), "seconds has no 'repeats'"),
        (_variant(columns={"parameters": 2 * MiB}), "columns has no 'gradients'"),
        (
            lambda d: d["records"][0]["variants"][0]["columns"].update(parameters=-1),
            "columns.parameters has to be",
        ),
    ],
)
def test_a_file_of_another_form_is_refused(change, found, tmp_path):
    data = copy.deepcopy(results_file(record()))
    results.validate(data)
    change(data)
    with pytest.raises(ValueError, match=re.escape(found)):
        results.validate(data)
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="cpu.json is not a results file"):
        results.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_what_is_no_results_file_at_all_is_refused(text, tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="cpu.json is not a results file"):
        results.load(path)


def test_a_run_replaces_its_own_records_and_the_others_keep_their_environment():
    first = results.merge(None, ENVIRONMENT, "03_x", lines(record()))
    first = results.merge(first, ENVIRONMENT, "01_y", lines(record("01_y", "y")))
    assert [one["notebook"] for one in first["records"]] == ["01_y", "03_x"]
    assert all("environment" not in one for one in first["records"])

    later = ENVIRONMENT | {"date": "2026-02-01", "torch": "2.14.0"}
    new = [record(sizes={"layers": 3}), record(sizes={"layers": 4})]
    second = results.merge(first, later, "03_x", lines(*new, torch="2.14.0", date="2026-02-01"))
    results.validate(second)
    kept, *fresh = second["records"]
    assert second["environment"] == later
    assert kept == first["records"][0] | {"environment": {"torch": "2.13.0", "date": "2026-01-31"}}
    assert fresh == new
    assert results.environment_of(second, kept) == ENVIRONMENT
    assert results.environment_of(second, fresh[0]) == later

    # Run again, it is of the file's environment, and a notebook that records no more loses its
    # records.
    third = results.merge(
        second, later, "01_y", lines(record("01_y", "y"), torch="2.14.0", date="2026-02-01")
    )
    assert "environment" not in third["records"][0]
    assert [one["notebook"] for one in results.merge(third, later, "03_x", [])["records"]] == [
        "01_y"
    ]


def test_a_record_says_in_what_it_differs_from_the_runner():
    data = results.merge(None, ENVIRONMENT, "03_x", lines(record(), threads=1))
    assert data["records"][0]["environment"] == {"threads": 1}


def test_a_file_is_named_by_its_device():
    assert results.file_name(ENVIRONMENT) == "cpu.json"
    assert results.file_name(GPU) == "nvidia-h200.json"
    assert results.file_name(GPU | {"gpu": "Tesla T4 (16 GB)"}) == "tesla-t4-16-gb.json"


def test_the_large_scale_has_a_file_of_its_own():
    """Its records are of another size: beside the course's own they would be compared with them."""
    assert results.file_name(ENVIRONMENT, "large") == "cpu-large.json"
    assert results.file_name(GPU, "large") == "nvidia-h200-large.json"
    for scale in ("cpu", "t4", "gpu", None):
        assert results.file_name(GPU, scale) == results.file_name(GPU)


def test_the_environment_is_complete(tmp_path):
    results.validate(results_file(environment=results.environment(tmp_path, "cpu")))


def test_the_commit_says_when_tracked_files_differ(tmp_path):
    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        asked = ["git", "-C", str(tmp_path), *options, *arguments]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()

    assert results.commit(tmp_path) is None
    git("init", "-q")
    assert results.commit(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    head = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert results.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert results.commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "inner").mkdir()
    assert (
        results.commit(tmp_path / "inner") is None
    )  # the commit of somebody else's repository says nothing


# claim() ------------------------------------------------------------------------------------------


def claim(number=3, holds=True, **more):
    more = {"notebook": "03_x", "found": "It is so.", **more}
    return results.claim(number, "less memory", holds=holds, **more)


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
    assert made == {
        "notebook": "03_x",
        "number": 3,
        "says": "less memory",
        "verdict": verdict,
        "found": "It is so.",
    }
    printer = RecordingPrinter()
    made._repr_pretty_(printer, cycle=False)
    assert printer.said == f"Claim 3: less memory\nVerdict: {verdict}.\nIt is so."


class RecordingPrinter:
    said = ""

    def text(self, text):
        self.said += text


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"holds": 1}, "True or False, not 1"),
        ({"holds": False, "when": "it rains"}, "does not hold, and yet"),
        ({"number": 0}, "number has to be a whole number of at least 1, not 0"),
        ({"found": " "}, "found has to be a text"),
    ],
)
def test_a_claim_that_cannot_be_kept_is_refused(wrong, found):
    with pytest.raises(ValueError, match=re.escape(found)):
        claim(**wrong)


def test_claims_are_kept_beside_the_records(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    monkeypatch.setenv(results.VARIABLE, str(path))
    record()
    second, first = claim(10), claim(3, holds=False)
    monkeypatch.delenv(results.VARIABLE)
    data = results.merge(
        None, ENVIRONMENT | measured_environment("cpu"), "03_x", results.read_lines(path)
    )
    assert len(data["records"]) == 1 and data["claims"] == [
        first,
        second,
    ]  # in the order of their numbers
    results.write(tmp_path / "cpu.json", data)
    assert results.load(tmp_path / "cpu.json") == data

    # Another notebook's run leaves them; the same notebook's run replaces them.
    later = ENVIRONMENT | {"date": "2026-02-01"}
    kept = results.merge(data, later, "04_y", [])["claims"]
    assert [one["number"] for one in kept] == [3, 10] and kept[0]["environment"][
        "date"
    ] == ENVIRONMENT["date"]
    assert results.merge(data, later, "03_x", [])["claims"] == []


def test_a_file_with_a_claim_that_is_none_is_refused():
    with pytest.raises(ValueError, match=re.escape("claims[0].verdict has to be")):
        results.validate(results_file() | {"claims": [claim() | {"verdict": "perhaps"}]})
