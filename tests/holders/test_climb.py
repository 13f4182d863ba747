"""From an object up to a name."""

import gc

import torch
from torch import nn

from memlab.holders import climb as climbing
from memlab.holders.climb import Climb
from memlab.holders.graph import Graphs
from memlab.holders.roots import find_roots


def climbed(thing, modules=()):
    climb = Climb(find_roots(), Graphs([], []))
    climb.note_modules(modules)
    climb.add(thing)
    climb.up(set())
    return climb


def kinds(climb, thing):
    """By names in the test itself: `climbed` has one too."""
    found = {(*(type(step).__name__ for step in way), root.name) for way, root in climb.ways(thing)}
    return sorted(found)


def test_the_shortest_way_by_each_holder():
    thing = torch.ones(1)
    inner = {"x": thing}
    outer = [[[inner]]]
    climb = climbed(thing)
    assert kinds(climb, thing) == [("Tensor", "dict", "inner"), ("Tensor", "thing")]
    del inner
    climb = climbed(thing)
    way = ("Tensor", "dict", "list", "list", "list", "outer")
    assert kinds(climb, thing) == [way, ("Tensor", "thing")]
    del outer


def test_it_ends_when_there_are_too_many_steps(monkeypatch):
    monkeypatch.setattr(climbing, "DEEPEST", 2)
    thing = torch.ones(1)
    outer = [[[{"x": thing}]]]
    climb = climbed(thing)
    assert kinds(climb, thing) == [("Tensor", "thing")]
    assert not climb.complete
    del outer


def test_a_layer_is_found_in_its_model_without_a_step_for_each_dictionary():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    modules = list(model.modules())
    climb = climbed(model[0][0].weight, modules)
    del modules
    way = ("Parameter", "dict", "Linear", "Sequential", "Sequential", "model")
    assert way in kinds(climb, model[0][0].weight)


def test_garbage_is_held_by_a_cycle_and_nothing_else():
    gc.disable()
    try:
        thing = torch.ones(1)
        box = [thing]
        box.append(box)
        assert not climbed(thing).is_garbage(thing)  # it is named `thing`, here
        reference = id(box)
        del box
        climb = climbed(thing)
        assert list(climb.parents[id(thing)]) == [reference]
        assert climb.is_garbage(climb.things[reference])
    finally:
        gc.enable()
        gc.collect()
