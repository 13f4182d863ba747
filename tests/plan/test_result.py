"""What a plan says, in a terminal and in a notebook."""

import pytest
import torch

from memlab import predict
from memlab.plan import Plan, Rung
from memlab.units import MiB


@pytest.fixture(scope="module")
def prediction():
    def train():
        weight = torch.zeros(MiB, device="cuda", requires_grad=True)
        while True:
            yield weight[:1].sum()

    return predict(train, gpu="24 GiB", progress=False)


def test_it_is_read_in_a_terminal_and_in_a_notebook(prediction):
    rungs = (
        Rung(None, 50 * MiB, True, None),
        Rung("fused loss", 40 * MiB, False, None, "left out: it fits without"),
        Rung("checkpoints", 30 * MiB, True, None),
        Rung("optimizer state offloading", 26 * MiB, True, 4 * MiB),
    )
    found = Plan(
        title="a <model>",
        fit=prediction.fits(),
        switches=("checkpoints", "optimizer state offloading"),
        rungs=rungs,
        before=prediction,
        after=prediction,
        code="train()",
        notes=("a guess",),
    )
    assert found and found.fits
    lines = str(found).split("\n")
    assert lines[0].startswith("a <model>: fits 24.00 GiB")
    assert lines[1] == "with checkpoints, optimizer state offloading"
    table = [line.split() for line in lines[3:8]]
    assert table[2] == "fused loss over 40.00 MiB * - x 2.08 left out: it fits without".split()
    assert table[4] == "optimizer state offloading 26.00 MiB 4.00 MiB x 1.09".split()
    assert any(line.startswith("* by formula") for line in lines)
    assert "note: a guess" in lines and lines[-1] == "train()"
    page = found._repr_html_()
    assert "a &lt;model&gt;" in page and "<td style='text-align:right'>4.00 MiB</td>" in page
