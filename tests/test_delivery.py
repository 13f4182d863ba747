"""Where a receipt goes: said, kept, written, under a name a rank."""

import re
from pathlib import Path

import torch

from memlab import measure, receipt
from memlab.delivery import deliver, of_this_rank
from tests.test_remedies import measured


def run():
    model = torch.nn.Linear(16, 16)
    yield model(torch.ones(8, 16)).sum()


def test_a_receipt_is_said_kept_and_written(tmp_path):
    said = []
    files = {"report": tmp_path / "a.html", "save": tmp_path / "a.json"}
    measurement = measure(run, steps=1)
    deliver(measurement, "a run", said.append, why=["too large"], **files)
    text, *written = said
    assert text.startswith(f"memlab: the receipt of a run\n{measurement}\nLargest at the peak:\n")
    assert re.search(r"\n  1\.00 KiB +1 x 1\.00 KiB +FP32 \(16, 16\) +parameters ", text)
    assert text.endswith("\ntoo large")
    assert written == [f"kept in {files['save']}", f"written: {files['report']}"]
    assert receipt.load(files["save"]).peak_bytes == measurement.peak_bytes
    assert "too large" in files["report"].read_text()


def test_a_rank_has_files_of_its_own(monkeypatch):
    assert of_this_rank("a/report.html") == Path("a/report.html")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert of_this_rank("a/report.html") == Path("a/report.rank1.html")
    said = []
    deliver(measured(), "a run", said.append)
    assert said[0].startswith("memlab: the receipt of a run, rank 1\n")
