"""Buffers that a kernel takes are given back in time."""

from memlab.meters.scratch import Scratch, lives_of


def test_buffers_are_given_back_in_time():
    buffers = [Scratch(1, 2), Scratch(2), Scratch(3)]
    events = [(0, True), (1, True), (0, False), (2, True), (1, False), (2, False)]
    assert list(lives_of(buffers)) == events
