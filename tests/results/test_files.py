"""Results files: their names, what a run puts into them, and that they are written whole."""

import re

import pytest

from memlab import results
from tests.records import ENVIRONMENT, GPU, claim, record, results_file

LATER = ENVIRONMENT.model_copy(update={"date": "2026-02-01", "torch": "2.14.0"})


def of(environment, kept):
    return kept.model_copy(update={"environment": environment})


def test_a_file_is_read_as_it_was_written(tmp_path):
    data = results_file(record(), claim())
    path = tmp_path / "results" / "cpu.json"
    results.write(path, data)
    assert results.load(path) == data
    assert b"\r" not in path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]  # nothing partial is left


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text("{}")
    found = f"{path} is not a results file: its schema is version None"
    with pytest.raises(ValueError, match=re.escape(found)):
        results.load(path)


def test_the_cpus_file_is_the_first(tmp_path):
    for environment in (GPU, ENVIRONMENT):
        path = tmp_path / "results" / results.file_name(environment)
        results.write(path, results_file(environment=environment))
    results.write(tmp_path / "results" / "a-gpu.json", results_file(environment=GPU))
    gpus = [data.environment.gpu for data in results.load_all(tmp_path)]
    assert gpus == [None, "NVIDIA H200", "NVIDIA H200"]


def test_a_run_replaces_its_own_records_and_the_others_keep_their_environment():
    first = results.merge(None, ENVIRONMENT, "03_x", [record()])
    first = results.merge(first, ENVIRONMENT, "01_y", [record("01_y", "y")])
    assert [kept.notebook for kept in first.records] == ["01_y", "03_x"]

    fresh = [record(sizes={"layers": 3}), record(sizes={"layers": 4})]
    fresh = [of(LATER, each) for each in fresh]
    second = results.merge(first, LATER, "03_x", fresh)
    assert second.environment == LATER
    assert second.records == [first.records[0], *fresh]
    assert second.records[0].environment == ENVIRONMENT

    # A notebook that records no more loses its records.
    third = results.merge(second, LATER, "03_x", [])
    assert [kept.notebook for kept in third.records] == ["01_y"]


def test_the_commit_and_the_date_are_the_runs_and_the_rest_is_the_records_own():
    in_a_thread = ENVIRONMENT.model_copy(update={"threads": 1, "commit": None})
    merged = results.merge(None, LATER, "03_x", [of(in_a_thread, record())])
    found = merged.records[0].environment
    assert (found.threads, found.torch) == (1, ENVIRONMENT.torch)
    assert (found.commit, found.date) == (LATER.commit, LATER.date)


def test_claims_are_kept_beside_the_records_in_the_order_of_their_numbers():
    data = results.merge(None, ENVIRONMENT, "03_x", [record(), claim(10), claim(3)])
    assert len(data.records) == 1 and [each.number for each in data.claims] == [3, 10]

    # Another notebook's run leaves them; the same notebook's run replaces them.
    kept = results.merge(data, LATER, "04_y", [])
    assert kept.claims == data.claims
    assert results.merge(data, LATER, "03_x", []).claims == []


def test_a_file_is_named_by_its_device():
    assert results.file_name(ENVIRONMENT) == "cpu.json"
    assert results.file_name(GPU) == "nvidia-h200.json"
    t4 = GPU.model_copy(update={"gpu": "Tesla T4 (16 GB)"})
    assert results.file_name(t4) == "tesla-t4-16-gb.json"


def test_the_large_scale_has_a_file_of_its_own():
    """Its records are of another size: beside the course's own they would be compared with them."""
    assert results.file_name(ENVIRONMENT, "large") == "cpu-large.json"
    assert results.file_name(GPU, "large") == "nvidia-h200-large.json"
    for scale in ("cpu", "t4", "gpu", None):
        assert results.file_name(GPU, scale) == results.file_name(GPU)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cpu.json"
    results.write(path, results_file(record()))
    before = path.read_bytes()

    def fails(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk is full"):
        results.write(path, results_file())
    assert path.read_bytes() == before
