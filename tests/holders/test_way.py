"""What refers to what, and by which name."""

import types

import torch

from memlab.holders.roots import Root
from memlab.holders.way import (
    Way,
    attribute_of,
    is_of_last_error,
    stopped_frame,
    without_dictionaries,
)


class Box:
    shared = object()

    def __init__(self, x):
        self.x = x


class Slots:
    __slots__ = ("x",)


def test_the_dictionary_of_an_object_is_left_out():
    tensor = torch.ones(1)
    box = Box(tensor)
    other = {"box": box}
    assert without_dictionaries([tensor, vars(box), box, other]) == [tensor, box, other]
    assert without_dictionaries([tensor, {"x": tensor}, [1]]) == [tensor, {"x": tensor}, [1]]


def test_a_copy_of_the_variables_is_left_out_and_a_variable_is_not():
    def function():
        values = {"x": 1}
        yield values

    generator = function()
    values = next(generator)
    assert without_dictionaries([1, values, generator]) == [1, values, generator]
    assert without_dictionaries([1, {"values": values}, generator]) == [1, generator]
    assert stopped_frame(generator) is generator.gi_frame
    assert stopped_frame(values) is None


def test_the_name_of_an_attribute():
    tensor = torch.ones(1)
    assert attribute_of(Box(tensor), tensor) == "x"
    assert attribute_of(Box, Box.shared) == "shared"
    slots = Slots()
    slots.x = tensor
    assert attribute_of(slots, tensor) == "x"
    assert attribute_of(Box(1), tensor) == ""


def test_a_way_goes_up():
    root = Root("x", "in f() at f.py:1")
    way = Way([1, (2,), [3], "end"], root)
    assert way.above(2) == Way([[3], "end"], root)
    assert way.above(1).above_types(tuple, list) == Way(["end"], root)
    assert way.above(9).owner is None


def test_the_frames_of_the_last_error(monkeypatch):
    try:
        raise RuntimeError
    except RuntimeError as error:
        trace = error.__traceback__
    assert not is_of_last_error(trace.tb_frame)
    monkeypatch.setattr("sys.last_traceback", trace, raising=False)
    assert is_of_last_error(trace.tb_frame)
    assert isinstance(trace, types.TracebackType)
