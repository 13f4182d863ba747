"""Single blocks, as PyTorch's memory viewer stacks them."""

import pytest

from memlab import figures
from memlab.figures.viewer import SMALL_COLOUR
from memlab.ledger import COLUMNS, Block, Ledger
from memlab.measurement import Measurement
from memlab.units import MiB


def run(*blocks):
    made = [
        Block(bytes=size, address=number, born=born, died=died, column=column, phase="forward")
        for number, (size, born, died, column) in enumerate(blocks)
    ]
    columns = dict.fromkeys(COLUMNS, 0) | {"activations": 6 * MiB}
    return Measurement(6 * MiB, columns, "forward", Ledger(made), {})


def heights(band):
    """The lowest and the highest point of a band."""
    points = band.get_paths()[0].vertices[:, 1]
    return points.min(), points.max()


def test_a_band_stands_on_those_before_it_and_falls_when_one_below_goes():
    figure = figures.viewer(
        run(
            (4 * MiB, 0, 20, "activations"), (2 * MiB, 10, None, "gradients"), (1, 0, None, "batch")
        )
    )
    small, below, above = figure.axes[0].collections
    assert heights(below) == pytest.approx((0, 4), abs=1e-4)
    assert heights(above) == pytest.approx((0, 6), abs=1e-4)
    assert figures.PALETTE["gradients"].lower() != SMALL_COLOUR.lower()
    assert "2 bands; the largest has 4.00 MiB" in figure.alt


def test_without_blocks_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="no block was recorded"):
        figures.viewer(run())
