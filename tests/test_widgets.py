"""The slider: it shows the figure of the value that is chosen."""

import struct

import pytest

from memlab import figures
from memlab.ledger import COLUMNS
from memlab.widgets import knob


def picture(size, title="Title"):
    return figures.ledgers({"one": dict.fromkeys(COLUMNS, 0) | {"activations": size}}, title)


@pytest.fixture(scope="module")
def pictures():
    return {size: picture(size * 1000, f"{size} <tokens>") for size in (1, 4, 16)}


def parts(box):
    slider, image, text = box.children
    return slider, image, text


def test_it_shows_the_figure_of_the_value(pictures):
    slider, image, text = parts(knob(pictures, "tokens"))
    assert slider.description == "tokens" and slider.value == 1
    shown = {}
    for value in (1, 4, 16, 4):
        slider.value = value
        assert bytes(image.value).startswith(b"\x89PNG")
        assert shown.setdefault(value, bytes(image.value)) == image.value
        # A title may hold what HTML would swallow.
        assert f"{value} &lt;tokens&gt;. one:" in text.value
    assert len(set(shown.values())) == 3


def test_the_picture_stays_as_large_when_the_slider_moves(pictures):
    slider, image, _ = parts(knob(pictures, "tokens"))
    sizes = set()
    for value in pictures:
        slider.value = value
        sizes.add(struct.unpack(">II", image.value[16:24]))
    assert len(sizes) == 1 and sizes.pop()[0] == round(7.2 * 110)


def test_where_it_starts(pictures):
    slider, image, _ = parts(knob(pictures, "tokens", start=16))
    assert (slider.value, slider.index) == (16, 2)
    assert [label for label, _ in slider.options] == ["1", "4", "16"]
    there = image.value
    slider.index = 0
    assert image.value != there
    slider.index = 2
    assert image.value == there


def test_one_picture_is_enough_and_any_key_will_do():
    slider, _, text = parts(knob({(1, "a"): picture(10)}, "pair"))
    assert slider.value == (1, "a") and "Title. one: 10 B" in text.value


def test_what_cannot_be_turned_is_refused(pictures):
    with pytest.raises(ValueError, match="at least one picture"):
        knob({}, "tokens")
    with pytest.raises(ValueError, match=r"2 is not one of the knob's values: \[1, 4, 16\]"):
        knob(pictures, "tokens", start=2)
