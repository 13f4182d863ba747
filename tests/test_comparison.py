"""Measurements side by side: the ratio, what a prediction missed, the table, the verdict."""

import pickle

import pandas as pd
import pytest
import torch
from torch import nn

from memlab.compare import compare
from memlab.ledger import COLUMNS, Block, Ledger
from memlab.measure import measure
from memlab.measurement import Measurement
from memlab.timing import Seconds
from memlab.units import MiB
from tests.helpers import training_step


def made(phase="backward", seconds=None, losses=None, reserved=None, device=None, **columns):
    """A measurement with these bytes by column."""
    columns = dict.fromkeys(COLUMNS, 0) | columns
    peak = sum(columns.values())
    return Measurement(
        peak, columns, phase, Ledger([]), {"device": "cpu"}, reserved, device, (), seconds, losses
    )


BEFORE = made(parameters=10 * MiB, activations=90 * MiB)
AFTER = made(parameters=10 * MiB, activations=10 * MiB, temporaries=5 * MiB)


def run(batch):
    def build():
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs = torch.randn(batch, 64)

        return training_step(optimizer, lambda: model(inputs).square().mean())

    return build


@pytest.fixture(scope="module")
def real():
    return [
        measure(run(batch), device="cpu", repeats=repeats)
        for batch, repeats in ((512, 2), (128, 2))
    ]


def test_two_real_runs(real):
    large, small = real
    compared = compare(large, small, predicted=small.peak_bytes - 100)
    assert [v.name for v in compared.variants] == ["before", "after"]
    assert compared.ratio == large.peak_bytes / small.peak_bytes > 2
    assert compared.residuals == {"before": None, "after": 100 * 100 / (small.peak_bytes - 100)}
    assert sum(compared.change().values()) == small.peak_bytes - large.peak_bytes
    frame = compared.to_frame()
    assert list(frame.index) == ["before", "after"]
    assert frame.loc["after", "measured MiB"] == small.peak_bytes / MiB
    held = [c for c in frame if c.removesuffix(" MiB").replace(" ", "_") in COLUMNS]
    assert frame[held].sum(axis=1).tolist() == pytest.approx(frame["measured MiB"].tolist())
    assert frame["s a step"].gt(0).all() and frame.loc["before", "× time"] == 1
    assert frame.loc["after", "last loss"] == small.losses[-1]
    again = pickle.loads(pickle.dumps(compared))
    assert again.verdict == compared.verdict and again.to_frame().equals(frame)


def test_the_table_leaves_out_what_says_nothing():
    frame = compare(BEFORE, AFTER).to_frame()
    assert list(frame) == [
        "measured MiB",
        "× less",
        "peak in",
        "parameters MiB",
        "activations MiB",
        "temporaries MiB",
    ]
    assert frame["× less"].tolist() == [1.0, 4.0]
    assert "× less" not in compare(BEFORE).to_frame()
    # What one variant has stays, and the others have none: never a 0 that nobody measured.
    gpu = made(
        parameters=MiB,
        reserved=2 * MiB,
        device=3 * MiB,
        seconds=Seconds(0.5, 0.1, 3),
        losses=(3.0, 2.0),
    )
    frame = compare(BEFORE, gpu, predicted=MiB).to_frame()
    for column, value in (
        ("reserved MiB", 2),
        ("device MiB", 3),
        ("s a step", 0.5),
        ("± s", 0.1),
        ("last loss", 2),
        ("predicted MiB", 1),
        ("residual %", 0),
    ):
        assert pd.isna(frame.loc["before", column]), column
        assert frame.loc["after", column] == value, column
    # Without a time of the baseline there is nothing to be faster than.
    assert "× time" not in frame


def test_what_operators_take_for_themselves_is_no_residual():
    blocks = [
        Block(100 * MiB, 1, 0, column="activations"),
        Block(5 * MiB, 2, 0, column="temporaries", scratch=True),
    ]
    ledger = Ledger(blocks)
    scratch = Measurement(105 * MiB, ledger.peak_columns(), "forward", ledger, {"device": "cpu"})
    compared = compare(AFTER, scratch, predicted=100 * MiB)
    assert compared.residuals == {"before": None, "after": 0}
    row = compared.to_frame().loc["after"]
    assert (row["measured MiB"], row["in tensors MiB"], row["residual %"]) == (105, 100, 0)
    assert "in tensors MiB" not in compare(BEFORE, AFTER, predicted=100 * MiB).to_frame()


def test_it_prints_as_text_and_as_html():
    compared = compare(BEFORE, AFTER, names=["a <b>", "after"], predicted=[None, 24 * MiB])
    for shown in (str(compared), repr(compared)):
        assert (
            "+4.17" in shown
            and "25.00" in shown
            and "nan" not in shown.lower()
            and "None" not in shown
        )
        assert shown.endswith(compared.verdict)
    page = compared._repr_html_()
    assert (
        "<table" in page
        and compared.verdict in page
        and "a <b>" not in page
        and "a &lt;b&gt;" in page
    )


@pytest.mark.parametrize(
    "runs, verdict",
    [
        ((BEFORE, AFTER), "Peak 100.00 MiB → 25.00 MiB (4.00× less): activations −80.00 MiB"),
        ((AFTER, BEFORE), "Peak 25.00 MiB → 100.00 MiB (4.00× more): activations +80.00 MiB"),
        ((BEFORE, AFTER, BEFORE), "Peak unchanged at 100.00 MiB"),
        (
            (BEFORE, made("optimizer", parameters=10 * MiB, optimizer_state=40 * MiB)),
            (
                "Peak 100.00 MiB → 50.00 MiB (2.00× less): activations −90.00 MiB, the peak is now"
                " in optimizer"
            ),
        ),
        # What grew most is not what made the peak fall.
        (
            (
                made(gradients=30 * MiB, activations=45 * MiB, optimizer_state=25 * MiB),
                made(gradients=30 * MiB, temporaries=50 * MiB),
            ),
            "Peak 100.00 MiB → 80.00 MiB (1.25× less): activations −45.00 MiB",
        ),
        # A factor of 1.00 would say nothing.
        (
            (made(batch=100 * MiB), made(batch=100 * MiB - 12)),
            "Peak 100.00 MiB → 100.00 MiB (12 B less): batch −12 B",
        ),
    ],
)
def test_the_verdict_says_what_happened(runs, verdict):
    assert compare(*runs).verdict == verdict


def test_within_names_what_is_too_far_off():
    compared = compare(BEFORE, AFTER, predicted=[100 * MiB, 20 * MiB])
    compared.within(25)
    message = r"after: predicted 20.00 MiB, measured 25.00 MiB in tensors: \+25.00 %, and 24 %"
    with pytest.raises(AssertionError, match=message):
        compared.within(24)
    compare(BEFORE, AFTER).within(0)  # nothing was predicted


def test_one_run_beside_its_prediction():
    assert compare(BEFORE).verdict == "Peak 100.00 MiB"
    alone = compare(BEFORE, predicted=80 * MiB)
    assert alone.verdict == "Peak 100.00 MiB, predicted 80.00 MiB (+25.00 %)"
    assert alone.residuals == {"measured": 25.0}
    assert alone.ratio == 1


def test_a_plot_says_the_verdict_or_what_it_is_told(real):
    compared = compare(*real)
    assert compared.plot().alt.startswith(f"{compared.verdict}. before: ")
    assert compared.plot("Smaller").alt.startswith("Smaller. before: ")
