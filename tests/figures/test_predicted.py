"""Predicted bars: what they add up to, where they are cut off, and that they say what they are."""

import pytest
from matplotlib.colors import to_hex, to_rgb

from memlab.figures import PALETTE, darken, predicted
from memlab.units import GiB
from tests.figures.reading import check_readable, in_legend, ledger, letters, rows

LEDGERS = {
    "small": ledger(parameters=4 * GiB, activations=6 * GiB),
    "far too large": ledger(parameters=40 * GiB, optimizer_state=80 * GiB),
}
NEEDED = {"small": 13 * GiB, "far too large": 123 * GiB}
CARDS = {"16 GB": 15 * GiB, "24 GB": 23 * GiB}


def drawn(**changes):
    given = {"ledgers": LEDGERS, "needed": NEEDED, "lines": CARDS, "title": "Title"} | changes
    figure = predicted(**given)
    return figure, figure.axes[0]


def test_an_outlined_bar_ends_at_what_the_process_needs():
    _, axes = drawn()
    small = [bar for bar in axes.patches if round(bar.get_y() + bar.get_height() / 2) == 0]
    assert [bar.get_width() for bar in small] == pytest.approx([4, 6, 3])
    assert [bar.get_x() for bar in small] == pytest.approx([0, 4, 10])
    assert to_hex(small[0].get_edgecolor()) == PALETTE["parameters"].lower()
    # Lighter than its outline: a measured bar is filled.
    assert sum(small[0].get_facecolor()) > sum(small[0].get_edgecolor())
    assert small[2].get_facecolor()[3] == 0
    assert rows(axes) == list(LEDGERS)


def test_a_bar_that_leaves_the_page_is_cut_off_and_its_number_says_so():
    _, axes = drawn()
    large = [bar for bar in axes.patches if round(bar.get_y() + bar.get_height() / 2) == 1]
    assert [bar.get_width() for bar in large] == pytest.approx([1.08 * 23])
    assert {"13.0", "→ 123"} <= set(letters(axes))


def test_the_cards_are_lines_with_their_names():
    _, axes = drawn()
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([15, 23])
    assert {"16 GB", "24 GB"} <= set(letters(axes))


def test_the_word_predicted_is_there_for_the_eyes_and_for_the_ears():
    figure, axes = drawn()
    assert "predicted" in axes.get_xlabel()
    assert figure.alt.startswith("Title. All predicted. small: 13.00 GiB (parameters 4.00 GiB,")
    assert figure.alt.endswith("Lines: 16 GB has 15.00 GiB, 24 GB has 23.00 GiB.")
    assert in_legend(figure) == [
        "parameters",
        "optimizer state",
        "activations",
        "allocator and CUDA context",
    ]


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_on_a_light_and_on_a_dark_page(dark):
    figure, axes = drawn()
    if dark:
        darken(figure)
    check_readable(figure)
    number = next(text for text in axes.texts if text.get_text() == "13.0")
    behind = number.get_bbox_patch().get_facecolor()
    assert (sum(to_rgb(number.get_color())) > sum(to_rgb(behind))) == dark
