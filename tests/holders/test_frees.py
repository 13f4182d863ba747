"""The line that is said to free a tensor is run, and frees it."""

import pytest
import torch
from torch import nn

from memlab.holders import find_holders
from memlab.holders.frees import KEEP_DETACHED, KEEP_NUMBER, REMOVE_HOOK
from tests.holders.test_words import ADDRESSES, CASES

pytestmark = pytest.mark.usefixtures("objects_frozen")

#: The lines to be had for what hangs at a variable `kept` (tests/holders/test_words.py).
LINES = {
    "a variable": "del kept",
    "a list": "kept.clear()",
    "a dict in a list": "kept.clear()",
    "a model's output": "kept.clear()",
    "a tuple": "del kept",
    "a set": "kept.clear()",
    "a queue of an object": "kept.buffer.clear()",
    "an object": "kept.saved = None",
    "objects in a list": "kept.clear()",
    "a list in a dict": "kept['losses'].clear()",
    "slots": "kept.x = None",
    "a generator": "kept.close()",
    "a coroutine": "kept.close()",
    "a closure": "del kept",
    "an attribute of a module": 'kept.get_submodule("1.0").seen = None',
    "a list of a module": 'kept.get_submodule("1.0").seen.clear()',
    "a gradient": "kept.grad = None",
    "an error": "del kept",
    "a graph": "del kept",
}


@pytest.mark.parametrize("case", LINES)
def test_the_line_frees_the_tensor(case):
    globals()["kept"] = CASES[case][0]()
    address = ADDRESSES.pop()
    [holder] = find_holders([address], device="cpu")
    assert holder.frees == LINES[case]
    exec(holder.frees, globals())
    assert find_holders([address], device="cpu") == []


@pytest.mark.parametrize("case", ["a class", "a parameter", "a buffer", "an optimizer"])
def test_nothing_is_said_where_no_line_is_surely_right(case):
    kept = CASES[case][0]()
    [holder] = find_holders([ADDRESSES.pop()], device="cpu")
    assert holder.frees == ("Space.x = None" if case == "a class" else None)
    del kept


def test_a_hook_is_removed_by_its_handle():
    layer = nn.Linear(1, 1)
    seen = [torch.ones(5)]
    handle = layer.register_forward_hook(lambda *_, seen=seen: None)
    address = seen[0].data_ptr()
    del seen
    [holder] = find_holders([address], device="cpu")
    assert (holder.kind, holder.frees) == ("hook", REMOVE_HOOK)
    handle.remove()
    assert find_holders([address], device="cpu") == []


def test_what_is_kept_instead_of_a_loss():
    x = torch.ones(7, requires_grad=True)
    outputs = [x.exp().sin()]
    losses = [output.sum() for output in outputs]
    address = outputs[0].grad_fn._raw_saved_self.data.data_ptr()
    found = {holder.path.split("`")[1]: holder.frees for holder in find_holders([address])}
    assert found == {"outputs": KEEP_DETACHED, "losses": KEEP_NUMBER}
    losses = [loss.item() for loss in losses]
    outputs = [output.detach() for output in outputs]
    assert find_holders([address]) == []


def test_a_cache_is_cleared():
    function = CASES["a cache"][0]()
    address = ADDRESSES.pop()
    [holder] = find_holders([address], device="cpu")
    assert holder.frees == "made.cache_clear()"
    function.cache_clear()
    assert find_holders([address], device="cpu") == []
