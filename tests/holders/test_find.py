"""`find_holders`: what it is given, what it gives back, and what it leaves behind."""

import gc
import weakref

import pytest
import torch
from torch import nn

from memlab.holders import Holder, find_holders
from memlab.meters.live import live_objects, objects_set_aside

pytestmark = pytest.mark.usefixtures("objects_frozen")

HERE = "at test_find.py:"


def paths(*tensors, **options):
    """Without what the tests' own runner holds."""
    return [holder.path for holder in find_holders(tensors, **options)]


def test_every_holder_is_named_once_the_shortest_way_first():
    logits = torch.ones(10)
    outputs = [{"logits": logits}]
    keeper = nn.Linear(1, 1)
    keeper.seen = logits.view(2, 5)  # a view keeps all of it
    found = find_holders(logits, device="cpu")
    test = f"in {test_every_holder_is_named_once_the_shortest_way_first.__name__}() {HERE}"
    assert [
        (holder.path.replace(test, "").rstrip("0123456789"), holder.frees) for holder in found
    ] == [
        ("variable `logits` ", "del logits"),
        ("attribute `seen` of Linear `keeper` ", "keeper.seen = None"),
        ("dict (1 entry) in list `outputs` (1 entry) ", "outputs.clear()"),
    ]
    assert paths(logits, limit=1) == [found[0].path]
    del outputs


def test_addresses_do_as_well():
    losses = [torch.ones(1) for _ in range(200)]
    by_tensor = find_holders(losses)
    assert by_tensor == find_holders([loss.data_ptr() for loss in losses], device="cpu")
    assert [holder.kind for holder in by_tensor] == ["list"]
    assert find_holders([]) == find_holders([12345]) == []


def test_two_tensors_in_one_list_are_one_holder():
    features = [torch.ones(1), torch.ones(2)]
    [holder] = find_holders(features)
    assert holder.path.startswith("list `features` (2 entries) in test_two")
    assert str(holder) == f"{holder.path} (frees it: features.clear())"
    assert str(Holder("`x`", "variable")) == "`x`"


def test_many_graphs_are_one_holder():
    weight = torch.ones(4, requires_grad=True)
    losses = [(weight * step).exp().sum() for step in range(100)]
    saved = [loss.grad_fn.next_functions[0][0]._raw_saved_result.data for loss in losses]
    addresses = [tensor.data_ptr() for tensor in saved]
    del saved
    [holder] = find_holders(addresses, device="cpu")
    assert holder.path.startswith(
        "the graph of a tensor in list `losses` (100 entries) in test_many"
    )


@pytest.mark.parametrize("thing", ["text", [None], [[torch.ones(1)]], [True]])
def test_anything_else_is_refused(thing):
    with pytest.raises(ValueError, match="takes tensors or addresses of storages, not a"):
        find_holders(thing)


def test_it_keeps_nothing_alive():
    tensor = torch.ones(10)
    net = nn.Linear(3, 3)
    loss = net(torch.ones(2, 3)).sum()
    node = loss.grad_fn.next_functions[0][0]
    gc.collect()
    gc.disable()
    try:
        find_holders([tensor, loss, net.weight])
        references = [weakref.ref(thing) for thing in (tensor, loss, net, net.weight)]
        del tensor, loss, net, node
        assert [reference() for reference in references] == [None] * 4
    finally:
        gc.enable()


def test_a_dictionary_of_the_variables_stays_as_it_is():
    """`locals()` gives the function's own dictionary, until Python 3.12."""
    tensor = torch.ones(10)
    settings = locals()
    assert "dict `settings`" in " ".join(paths(tensor))
    assert settings["tensor"] is tensor


class Strange:
    """Fails whatever it is asked."""

    __slots__ = ("kept",)

    def __getattribute__(self, name):
        raise RuntimeError(name)

    def __eq__(self, other):
        raise RuntimeError

    __hash__ = object.__hash__


class Dictionary(dict):
    def items(self):
        raise RuntimeError

    def __len__(self):
        raise RuntimeError


def test_strange_objects_do_no_harm():
    strange = Strange()
    object.__setattr__(strange, "kept", torch.ones(3))
    outputs = Dictionary(x=torch.ones(4))
    kept = Strange.kept.__get__(strange).data_ptr()
    assert "Strange `strange`" in " ".join(p.path for p in find_holders([kept], device="cpu"))
    assert "Dictionary `outputs`" in " ".join(paths(outputs["x"]))


def test_what_the_collector_has_not_found_is_a_cycle():
    gc.collect()
    gc.disable()
    try:
        box = [torch.ones(5)]
        address = box[0].data_ptr()
        box.append(box)
        del box
        [holder] = find_holders([address], device="cpu")
        assert (holder.kind, holder.frees) == ("cycle", "gc.collect()")
    finally:
        gc.enable()
        gc.collect()
    assert find_holders([address], device="cpu") == []


KEPT = []


def test_inside_a_run_that_is_measured():
    """Its objects from before are set aside; and a generator that runs is no suspended one."""
    gc.unfreeze()  # the objects of this file's tests: `objects_set_aside` does nothing else
    found = []

    def train():
        loss = torch.ones(3)
        KEPT.append(loss)
        found.append(find_holders(loss))
        KEPT.clear()
        yield

    with objects_set_aside():
        assert gc.get_freeze_count() > 1000
        next(train())
        tensor = torch.ones(1)
        assert any(thing is tensor for thing in live_objects(torch.Tensor))
        # Set aside once more, garbage that the search met would stay.
        assert gc.get_freeze_count() == 0
    assert gc.get_freeze_count() == 0
    assert [holder.kind for holder in found[0]] == ["variable", "list"]
    assert found[0][1].path.startswith("list `KEPT` (1 entry) in module tests.holders.test_find")
