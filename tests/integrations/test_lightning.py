"""The callback, in Lightning's Trainer."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning.pytorch")

from memlab import receipt  # noqa: E402 - after what may be missing
from memlab.integrations.lightning import MemlabCallback  # noqa: E402
from memlab.watch import watch  # noqa: E402
from tests.helpers import columns_alive  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

WEIGHTS = 4 * (32 * 64 + 64 + 64 * 32 + 32)


class Module(lightning.LightningModule):
    def __init__(self, fails_at=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.fails_at = fails_at

    def training_step(self, batch, index):
        loss = self.net(batch).square().mean()
        if index == self.fails_at:
            raise ArithmeticError("no")
        return loss

    def validation_step(self, batch, index):
        self.log("validated", self.net(batch).mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def fit(folder, callback, module=None):
    logger = lightning.loggers.CSVLogger(folder)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[callback],
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    batches = torch.utils.data.DataLoader(torch.randn(32, 32), batch_size=8)
    trainer.fit(module or Module(), batches, batches)
    return Path(logger.log_dir) / "metrics.csv"


def test_steps_and_the_evaluation_are_measured(tmp_path, capsys):
    callback = MemlabCallback(2, 3, report=tmp_path / "report.html", save=tmp_path / "kept.json")
    before = columns_alive()
    metrics = fit(tmp_path, callback)
    steps, evaluation = callback.measurements["steps"], callback.measurements["evaluation"]
    for measurement in (steps, evaluation):
        came = {name: size - before[name] for name, size in measurement.columns.items()}
        assert came["parameters"] == WEIGHTS
        assert came["optimizer_state"] == 2 * WEIGHTS + 4 * 4
        assert came["gradients"] == (WEIGHTS if measurement is steps else 0)
    assert "memlab: the receipt of the steps\nPeak " in capsys.readouterr().out
    assert receipt.load(tmp_path / "kept.json").peak_bytes == steps.peak_bytes
    assert (tmp_path / "report.evaluation.html").is_file()
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    logged = {name: row[name] for row in rows for name in row if row[name]}
    assert int(logged["memlab/steps/peak"]) == steps.peak_bytes
    assert int(logged["memlab/evaluation/parameters"]) == evaluation.columns["parameters"]


def test_the_sanity_check_is_no_evaluation_and_none_may_be_asked_for(tmp_path):
    callback = MemlabCallback(evaluation=False)
    fit(tmp_path, callback)
    assert list(callback.measurements) == ["steps"]  # of fewer steps than were asked for


def test_after_an_error_the_receipt_is_printed(tmp_path, capsys):
    callback = MemlabCallback()
    before = columns_alive()["optimizer_state"]
    with pytest.raises(ArithmeticError):
        fit(tmp_path, callback, Module(fails_at=1))
    state = callback.measurements["steps"].columns["optimizer_state"] - before
    assert state == 2 * WEIGHTS + 4 * 4
    assert "memlab: the receipt of the steps" in capsys.readouterr().out


def test_inside_another_measurement_the_training_goes_on(tmp_path, capsys):
    callback = MemlabCallback()
    before = columns_alive()["parameters"]
    with watch() as watched:
        fit(tmp_path, callback)
    assert callback.measurements == {}
    assert watched.measurement.columns["parameters"] - before == WEIGHTS
    assert "memlab does not watch the steps: a measurement is running" in capsys.readouterr().out
