"""Where a tensor hangs, in words: one case for each kind of holder."""

import collections
import functools
import re
import types

import pytest
import torch
from torch import nn

from memlab.holders import find_holders

pytestmark = pytest.mark.usefixtures("objects_frozen")

ADDRESSES = []


def made(*shape):
    """The tensor that is looked for."""
    tensor = torch.ones(shape or 10)
    ADDRESSES.append(tensor.data_ptr())
    return tensor


class Hook:
    def __init__(self):
        self.saved = made()

    def __call__(self, module, inputs, output):
        return None

    def method(self, module, inputs):
        return None


class Slots:
    __slots__ = ("x",)

    def __init__(self):
        self.x = made()


class Output(collections.OrderedDict):
    pass


def network():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def changed(change):
    """A model to whose layer `1.0` something was done."""
    model = network()
    change(model[1][0])
    return model


def cached():
    function = functools.lru_cache(made)
    function()
    return function


def suspended():
    held = made()
    yield 1
    yield held


def started():
    generator = suspended()
    next(generator)
    return generator


async def waiting():
    held = made()
    await types.coroutine(lambda: (yield))()
    return held


def awaited():
    task = waiting()
    task.send(None)
    return task


def closure():
    best = made()

    def step(*_):
        return best

    return step


def remembers():
    features = [made()]

    def save(*_):
        features.clear()

    return save


def hook_of_a_tensor():
    weight = torch.ones(1, requires_grad=True)
    weight.register_hook(closure())
    return weight


def gradient():
    weight = torch.ones(2, 2, requires_grad=True)
    weight.grad = made(2, 2)
    return weight


def optimizer_state():
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = made()
    return optimizer


def failed(values=None):
    act = made()
    raise RuntimeError(str(act.shape))


def error():
    try:
        failed()
    except RuntimeError as error:
        return error


def graph():
    """The sine keeps its input, which nothing of Python's holds."""
    return made().requires_grad_().exp().sin()


def graph_of_a_checkpoint():
    x = made().requires_grad_()
    return torch.utils.checkpoint.checkpoint(lambda x: x.exp().sin(), x, use_reentrant=False)


CASES = {
    "a variable": (made, "variable", "variable `kept`"),
    "a list": (lambda: [made(), 1], "list", "list `kept` (2 entries)"),
    "a dict in a list": (
        lambda: [{"x": made()}],
        "dict",
        "dict (1 entry) in list `kept` (1 entry)",
    ),
    "a list in a dict": (
        lambda: {"losses": [made()]},
        "list",
        "list (1 entry) in dict `kept` (1 entry)",
    ),
    "a model's output": (lambda: Output(x=made()), "dict", "Output `kept` (1 entry)"),
    "a tuple": (lambda: (made(), 1, 2), "list", "tuple `kept` (3 entries)"),
    "a set": (lambda: {made()}, "list", "set `kept` (1 entry)"),
    "a queue of an object": (
        lambda: types.SimpleNamespace(buffer=collections.deque([made()])),
        "list",
        "deque `buffer` (1 entry) of SimpleNamespace `kept`",
    ),
    "an object": (Hook, "attribute", "attribute `saved` of Hook `kept`"),
    "slots": (Slots, "attribute", "attribute `x` of Slots `kept`"),
    "objects in a list": (
        lambda: [[Hook()]],
        "attribute",
        "attribute `saved` of Hook in list (1 entry) in list `kept` (1 entry)",
    ),
    "a class": (
        lambda: type("Space", (), {"x": made()}),
        "attribute",
        "attribute `x` of class Space",
    ),
    "an attribute of a tensor": (
        lambda: changed(lambda layer: setattr(layer.weight, "old", made())),
        "attribute",
        "attribute `old` of parameter `1.0.weight` of Sequential `kept`",
    ),
    "a cache": (cached, "dict", "a tensor in the cache of made()"),
    "a generator": (started, "variable", "variable `held` in the suspended generator suspended()"),
    "a coroutine": (awaited, "variable", "variable `held` in the suspended coroutine waiting()"),
    "a closure": (closure, "closure", "cell `best` of step()"),
    "a list in a closure": (remembers, "list", "list `features` (1 entry) of save()"),
    "a parameter": (
        lambda: changed(lambda layer: setattr(layer, "weight", nn.Parameter(made()))),
        "attribute",
        "parameter `1.0.weight` of Sequential `kept`",
    ),
    "a buffer": (
        lambda: changed(lambda layer: layer.register_buffer("mean", made())),
        "attribute",
        "buffer `1.0.mean` of Sequential `kept`",
    ),
    "an attribute of a module": (
        lambda: changed(lambda layer: setattr(layer, "seen", made())),
        "attribute",
        "attribute `1.0.seen` of Sequential `kept`",
    ),
    "a list of a module": (
        lambda: changed(lambda layer: setattr(layer, "seen", [made()])),
        "list",
        "list `1.0.seen` (1 entry) of Sequential `kept`",
    ),
    "a gradient": (gradient, "gradient", "the gradient of variable `kept`"),
    "a forward hook": (
        lambda: changed(lambda layer: layer.register_forward_hook(remembers())),
        "hook",
        "list `features` (1 entry) of save(), a forward hook of `1.0` of Sequential `kept`",
    ),
    "an object that is a hook": (
        lambda: changed(lambda layer: layer.register_forward_hook(Hook())),
        "hook",
        "attribute `saved` of Hook, a forward hook of `1.0` of Sequential `kept`",
    ),
    "a method that is a hook": (
        lambda: changed(lambda layer: layer.register_forward_pre_hook(Hook().method)),
        "hook",
        "attribute `saved` of Hook, a forward pre hook of `1.0` of Sequential `kept`",
    ),
    "a closure that is a hook": (
        lambda: changed(lambda layer: layer.register_full_backward_hook(closure())),
        "hook",
        "cell `best` of step(), a backward hook of `1.0` of Sequential `kept`",
    ),
    "a hook of a tensor": (
        hook_of_a_tensor,
        "hook",
        "cell `best` of step(), a hook of variable `kept`",
    ),
    "an optimizer": (
        optimizer_state,
        "dict",
        "dict (1 entry) in dict `state` (1 entry) of SGD `kept`",
    ),
    "an error": (
        error,
        "traceback",
        "variable `act` in failed(), kept by the traceback of RuntimeError `kept`",
    ),
    "a graph": (graph, "graph", "the graph of `kept`"),
    "the graph of a list": (
        lambda: [graph()],
        "graph",
        "the graph of a tensor in list `kept` (1 entry)",
    ),
    "a checkpoint": (graph_of_a_checkpoint, "graph", "the graph of `kept`"),
}


def without_places(path):
    """Without the file and the line, and the name of this test."""
    path = re.sub(r" at test_words\.py:\d+", "", path)
    return path.replace(" in test_the_holder_is_named()", "").replace("<lambda>", "")


@pytest.mark.parametrize(("make", "kind", "path"), CASES.values(), ids=CASES)
def test_the_holder_is_named(make, kind, path):
    kept = make()
    found = find_holders([ADDRESSES.pop()], device="cpu")
    assert [(holder.kind, without_places(holder.path)) for holder in found] == [(kind, path)]
    del kept


def test_the_line_is_that_which_sets_the_variable():
    line = test_the_line_is_that_which_sets_the_variable.__code__.co_firstlineno
    logits = made()
    [holder] = find_holders(logits)
    assert holder.path.endswith(f"ets_the_variable() at test_words.py:{line + 2}")
