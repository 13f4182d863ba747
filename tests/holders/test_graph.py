"""What autograd's graphs hold: without unpacking anything."""

import torch

from memlab.holders import graph
from memlab.holders.graph import Graphs

CPU = torch.device("cpu")


def savers(graphs, tensor):
    [nodes] = graphs.savers({tensor.data_ptr()}, CPU).values()
    return [type(node).__name__ for node in nodes]


def test_what_a_node_saved_is_found_and_who_holds_the_node():
    x = torch.ones(3, requires_grad=True)
    hidden = x.exp()
    loss = (hidden * hidden.sin()).sum()
    graphs = Graphs([x, hidden, loss], [])
    assert sorted(savers(graphs, hidden)) == ["ExpBackward0", "MulBackward0", "SinBackward0"]
    assert savers(graphs, x) == ["AccumulateGrad"]
    # First the tensor whose graph is no part of another's.
    assert [owner is loss for owner in graphs.owners(hidden.grad_fn)] == [True, False]
    assert graphs.owners(loss) == []


def test_a_graph_whose_backward_has_run_saves_nothing():
    x = torch.ones(3, requires_grad=True)
    hidden = x.exp()
    loss = hidden.sum()
    loss.backward()
    assert Graphs([loss], []).savers({hidden.data_ptr()}, CPU) == {}


def test_no_hook_is_called():
    calls = []

    def pack(tensor):
        return {"packed": tensor}

    x = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, calls.append):
        y = x.exp()
    graphs = Graphs([y], [])
    assert savers(graphs, y) == ["ExpBackward0"]  # what the hook packed
    assert list(map(type, graphs.holder.values())) == [type(y.grad_fn)] * 2  # that and the hook
    assert calls == []


def test_a_function_with_attributes_is_a_node_too():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

    x = torch.ones(3, requires_grad=True) * 1
    y = Double.apply(x)
    assert savers(Graphs([y], []), x) == ["DoubleBackward"]


def test_a_very_long_graph_is_cut_off(monkeypatch):
    monkeypatch.setattr(graph, "MOST_NODES", 10)
    x = torch.ones(1, requires_grad=True)
    y = x
    for _ in range(50):
        y = y + 1
    assert Graphs([y], []).savers({x.data_ptr()}, CPU) == {}


def test_nodes_that_python_holds_hold_their_graph():
    x = torch.ones(3, requires_grad=True)
    node = x.exp().sum().grad_fn
    [below] = [following for following, _ in node.next_functions]
    assert Graphs([], [node]).owners(below) == [node]
