"""A notebook's recorded runs, predicted instead of measured."""

import json
from pathlib import Path

import torch

from memlab import measure, results
from memlab.course import rerun, validate

ROOT = Path(__file__).resolve().parents[2]

CELLS = (
    "import torch\nfrom memlab import compare, measure, results\n"
    "from memlab.workloads import scale\nhere = scale()\nhow_many = 256",
    "def build():\n"
    "    weight = torch.ones(how_many, how_many, device=here.device, requires_grad=True)\n"
    "    def step():\n"
    "        loss = (weight * 2).sum()\n"
    "        loss.backward()\n"
    "        return loss\n"
    "    return step",
    "beside = torch.ones(3, device=here.device)\nassert beside.is_cuda",
    "results.record(compare(measure(build), names=['once']), technique='x', sizes={'n': how_many})",
)


def test_what_a_record_needs_is_predicted_at_its_place(tmp_path):
    cells = [
        {"cell_type": "code", "source": [cell], "metadata": {}, "outputs": []} for cell in CELLS
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    path = tmp_path / "00_x.ipynb"
    path.write_text(json.dumps(notebook))
    record = results.load(ROOT / "results" / validate.FILES[0]).records[0]
    called = []
    found = rerun.run_again(path, record.scale, "A100 80GB", called.append, record)
    assert found.stopped == []
    [(technique, sizes, calls)] = found.records
    assert (technique, sizes) == ("x", {"n": 256})
    assert [calls["once"]] == called and called[0].beside == ["beside"]
    assert calls["once"].columns["gradients"] == 4 * 256 * 256
    # All is as before.
    assert type(torch.ones(1)) is torch.Tensor and measure.__module__ == "memlab.measure"
