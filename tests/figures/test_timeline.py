"""Timelines: what they reach up to, and where the phases are named."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from torch.utils.checkpoint import checkpoint

from memlab import figures
from memlab.figures.timeline import joined
from memlab.ledger import Span
from memlab.measure import measure
from memlab.units import KiB, MiB, format_bytes
from memlab.workloads import gpt
from tests.figures.reading import check_readable, check_stack, letters, marks, of_length


def real(checkpointed):
    """Two steps of a small model: what is made up is tidier than what is measured."""

    def build():
        model = gpt.GPT(gpt.tiny(layers=2))
        if checkpointed:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        optimizer = torch.optim.AdamW(model.parameters())
        tokens = torch.randint(256, (4, 64))

        def step():
            model(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return measure(build, device="cpu")


@pytest.mark.usefixtures("objects_frozen")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_real_run(checkpointed):
    run = real(checkpointed)
    figure = figures.timeline(run)
    [axes] = figure.axes
    unit, unit_name = figures.unit_for(run.peak_bytes)
    check_stack(axes, run, unit)
    title = f"Peak {format_bytes(run.peak_bytes)}, in {run.phase}"
    assert figure.get_suptitle() == title
    assert figure.alt.startswith(f"Timeline of memory by column. {title}. At the peak: parameters ")
    assert axes.get_xlabel().endswith("seconds since the first step began")
    assert axes.get_ylabel() == f"{unit_name} alive"
    named = {text for text in letters(axes) if text}
    assert named <= {"forward", "backward", "optimizer", "fwd", "bwd", "opt"}
    assert named & {"forward", "fwd"}
    # Each phase has its stretch of the strip, and the strip is above the curve.
    assert len(axes.patches) == len(run.ledger.phases)
    assert 0.945 * axes.get_ylim()[1] > run.peak_bytes / unit
    check_readable(figure)


def test_a_run_without_phases_and_one_of_nothing():
    def build():
        kept = torch.zeros(1000)
        return lambda: torch.zeros(2000) is kept

    figure = figures.timeline(measure(build, device="cpu"), "Two tensors")
    assert marks(figure.axes[0], "v")[0][1] == pytest.approx(12_000 / KiB)
    check_readable(figure)
    with pytest.raises(ValueError, match="allocated nothing on this device"):
        figures.timeline(measure(lambda: lambda: None, device="cpu"))


@pytest.mark.parametrize(
    "seconds, unit",
    [
        (4e-5, "milliseconds"),
        (0.03, "milliseconds"),
        (1.9, "milliseconds"),
        (2.1, "seconds"),
        (4000, "seconds"),
    ],
)
def test_short_and_long_ones_can_be_read(seconds, unit):
    run = of_length(seconds)
    figure = figures.timeline(run)
    [axes] = figure.axes
    assert axes.get_xlabel() == f"{unit} since the first step began"
    check_stack(axes, run, MiB)
    assert letters(axes) == ["forward", "backward", "opt", "forward", "backward", "opt"]
    check_readable(figure)


def test_an_optimizer_that_steps_once_a_parameter_is_one_phase_of_the_strip():
    kinds = ["forward", "backward", *["optimizer"] * 3, "forward", "backward", "optimizer"]
    phases = [Span(10 * i, 10 * i + 10, kind) for i, kind in enumerate(kinds)]
    assert joined(phases) == [*phases[:2], Span(20, 50, "optimizer"), *phases[5:]]
    apart = [Span(0, 10, "optimizer"), Span(10, 20, "backward"), Span(20, 30, "optimizer")]
    assert joined(apart) == apart


def test_a_hundred_short_phases_draw_no_lines_over_the_curve():
    kinds = ["forward", "backward", *["optimizer", "backward"] * 100]
    [axes] = figures.timeline(of_length(1.0, (40, 40, *[0.1, 0.1] * 100), kinds)).axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert len(lines) == 2  # where forward and backward begin
    assert len(axes.patches) == 202


def test_the_curve_has_the_palettes_colours():
    image = pytest.importorskip("PIL.Image")
    opened = image.open(io.BytesIO(figures.timeline(of_length(1)).png()))
    pixels = np.asarray(opened.convert("RGB"))
    for column in ("parameters", "activations"):
        colour = np.array([round(255 * part) for part in to_rgb(figures.PALETTE[column])])
        assert (pixels == colour).all(axis=2).mean() > 0.01, column
