"""The steps as a small picture."""

import dataclasses
import re
from xml.etree import ElementTree

import pytest

from memlab.figures import PALETTE
from memlab.small_plot import LEFT_COLOUR, small_plot
from memlab.units import MiB
from tests.test_verdict import steps


def points(picture):
    lines = re.findall(r"points='([^']*)'", picture)
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]


def test_a_rise_is_a_rise_and_numbers_are_in_their_place():
    run = steps([4 * MiB, 8 * MiB, 8 * MiB, 8 * MiB], [MiB, 2 * MiB, 3 * MiB, 4 * MiB])
    run[-1] = dataclasses.replace(run[-1], number=10)
    picture = small_plot(run)
    ElementTree.fromstring(picture)
    peaks, left = points(picture)
    heights = [60 - y for _, y in left]  # the axis lies at 60, and zero on it
    assert heights == pytest.approx([6.75, 13.5, 20.25, 27], abs=0.06)
    assert [60 - y for _, y in peaks] == [27, 54, 54, 54]
    places = [x for x, _ in left]
    assert places[0] < places[1] < places[2] and places[3] - places[2] > 6 * (places[1] - places[0])
    assert "the peak of each is at most 8.00 MiB, and the last one leaves 4.00 MiB" in picture
    assert PALETTE["kept"] == LEFT_COLOUR


def test_fewer_than_three_steps_are_no_picture():
    assert small_plot(steps([90, 90], [50, 50])) == small_plot([]) == ""
    recorded = steps([90] * 4, [50] * 4)
    cheap = [dataclasses.replace(s, peak_bytes=None, bytes_left=None) for s in recorded[2:]]
    assert small_plot([*recorded[:2], *cheap]) == ""
