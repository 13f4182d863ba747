"""What was predicted is kept until the notebook changes."""

from types import SimpleNamespace

from memlab.course.kept_calls import Kept


def call(number, prediction):
    return SimpleNamespace(number=number, prediction=prediction, beside=["x"], predict=fail)


def fail():
    raise ValueError("no shapes")


def test_it_is_there_again_until_the_notebook_changes(tmp_path, capsys):
    notebook = tmp_path / "00_x.ipynb"
    notebook.write_text("{}")
    (tmp_path / "build" / "validate").mkdir(parents=True)
    kept = Kept(tmp_path, notebook, "gpu.json", on_disk=True)
    predicted = SimpleNamespace(allocated_bytes=5, reserved_bytes=7, notes=("assumed",))
    kept.add(call(0, predicted))
    kept.add(call(1, None))
    assert kept.found[0] == {
        "allocated": 5,
        "reserved": 7,
        "beside": ["x"],
        "notes": ["assumed"],
    }
    assert kept.found[1] == {"error": "ValueError: no shapes"}
    assert "run 1" in capsys.readouterr().out
    assert Kept(tmp_path, notebook, "gpu.json", on_disk=True).found == kept.found
    assert Kept(tmp_path, notebook, "gpu.json", on_disk=False).found == {}
    notebook.write_text('{"cells": []}')
    assert Kept(tmp_path, notebook, "gpu.json", on_disk=True).found == {}
