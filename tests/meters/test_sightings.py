"""What was seen of a run keeps nothing of it alive."""

import gc
import weakref

import torch
from torch import nn

from memlab.meters.observer import Observer
from memlab.meters.sightings import Sightings

CPU = torch.device("cpu")


def test_the_observer_keeps_nothing_alive():
    model, inputs = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(4, 64)
    optimizer = torch.optim.SGD(model.parameters())
    with Observer(CPU) as observer:
        model(inputs).mean().backward()
        optimizer.step()
        observer.seen.look_around(before=True)
        gone = [
            weakref.ref(thing)
            for thing in (model, inputs, optimizer, model[0].weight, model[0].weight.grad)
        ]
        del model, inputs, optimizer
        gc.collect()
        assert [reference() for reference in gone] == [None] * 5
    assert len(observer.seen.observations) > 10


def test_a_parameter_at_the_id_of_one_that_is_gone_is_seen():
    """Python gives an object's id out again. The gradient of the second is a gradient
    all the same.
    """
    seen = Sightings(CPU)
    for _ in range(50):
        layer = nn.Linear(4, 4)
        seen.see_module(layer, "layer")
        assert any(parameter is layer.weight for parameter in seen.used_parameters())
        del layer
