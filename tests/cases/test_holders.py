"""Who holds the memory: the cases C1 and C15."""

import gc
import sys
import textwrap

import nbformat
import torch
from torch import nn

from memlab.course import kernel
from memlab.holders import find_holders
from memlab.meters.heap import heap_in_use
from memlab.meters.live import live_storages

CPU = torch.device("cpu")


def network():
    """24 layers."""
    return nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(32, 32), nn.Tanh())))


def test_c1_a_sum_of_losses_grows_on_the_host_and_not_on_the_device():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch = torch.ones(8, 32)
    total = 0.0
    heap, device = {}, {}
    gc.collect()  # what other tests have left would go at any time
    for step in range(60):
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss
        del loss
        if step in (9, 59):
            heap[step] = heap_in_use()
            device[step] = sum(storage.nbytes() for storage in live_storages(CPU).values())
    assert device[59] == device[9]
    if heap[9] is not None:
        assert 15_000 < (heap[59] - heap[9]) / 50 < 100_000  # the nodes of one graph a step


def test_c1_an_evaluation_that_keeps_its_graph_is_held_by_the_list_of_losses():
    model = network()
    losses = []
    for _ in range(4):
        losses.append(model(torch.ones(8, 32)).square().mean())
    # The activation before the last Tanh: no Python object holds it.
    saved = losses[0].grad_fn.next_functions[0][0].next_functions[0][0]
    [holder] = find_holders([saved._raw_saved_result.data.data_ptr()])[:1]
    assert holder.kind == "graph"
    assert holder.path.startswith(
        "the graph of a tensor in list `losses` (4 entries) in test_c1_an"
    )
    assert "loss.item()" in holder.frees


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x * 1  # not by save_for_backward: a reference cycle that only the collector ends
        return ctx.x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_c1_a_function_that_sets_an_attribute_is_named():
    loss = Kept.apply(torch.ones(10, requires_grad=True)).sum()
    [holder] = find_holders(loss.grad_fn.next_functions[0][0].x)
    where = "in test_c1_a_function_that_sets_an_attribute_is_named() at test_holders.py:"
    assert holder.kind == "attribute"
    assert holder.path.startswith(f"attribute `x` of Kept in the graph of `loss` {where}")


# --- C15: a notebook ------------------------------------------------------------------------------

SET_UP = """
    import weakref
    import torch
    from memlab.holders import find_holders

    class Probe:
        '''What find_holders says of a tensor, and whether it is alive: without holding it.'''
        def __init__(self, tensor):
            self.address = tensor.untyped_storage().data_ptr()
            self.reference = weakref.ref(tensor)
        def holders(self):
            return [(h.kind, h.path, h.frees) for h in find_holders([self.address])]
        def is_alive(self):
            return self.reference() is not None

    def forward(x):
        global probe
        hidden = x * 2
        probe = Probe(hidden)
        raise RuntimeError("no")
"""

CELLS = (
    SET_UP,
    "out = torch.ones(1000, 1179)  # 4,716,000 bytes\nout",
    "probe = Probe(out)",
    """
    assert probe.holders() == [
        ("variable", "variable `out` in the notebook", "del out"),
        (
            "notebook output",
            "`Out[2]`, `_`, `_2`, `user_ns_hidden['_']` of the notebook",
            "%xdel _2",
        ),
    ], probe.holders()
    """,
    """
    del out
    assert probe.is_alive() and [h[0] for h in probe.holders()] == ["notebook output"]
    """,
    "%xdel _2",
    "assert not probe.is_alive() and probe.holders() == []",
    "torch.ones(10)",
    "_ + 1",
    "probe = Probe(_8)",
    """
    [(kind, path, frees)] = probe.holders()
    assert path == "`Out[8]`, `__`, `_8`, `user_ns_hidden['__']` of the notebook", path
    """,
    "[torch.ones(10), 3]",
    """
    [(kind, path, frees)] = Probe(_12[0]).holders()
    assert kind == "list" and "`Out[12]`" in path and frees == "%xdel _12"
    """,
    "forward(torch.ones(10))  # raises",
    """
    [(kind, path, frees)] = probe.holders()
    assert path == "variable `hidden` in forward() at In[1]:17, kept by the last error" + (
        " (RuntimeError)"
    ), path
    assert kind == "traceback" and frees.startswith("1/0"), frees
    """,
    "1/0  # raises",
    """
    import gc
    gc.collect()
    assert not probe.is_alive() and probe.holders() == []
    """,
)


def test_c15_a_notebook_holds_what_a_cell_returned_and_what_failed(tmp_path):
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(cell).strip()) for cell in CELLS]
    for cell in cells:
        if "# raises" in cell.source:
            cell.metadata["tags"] = ["raises-exception"]
    error = kernel.execute(
        nbformat.v4.new_notebook(cells=cells),
        folder=tmp_path,
        records=tmp_path / "records.jsonl",
        timeout=120,
        on_cell=lambda **_: None,
        after_cell=lambda **_: None,
        on_print=lambda line: None,
    )
    assert error == ""


def test_c15_a_script_that_failed_has_no_next_cell(monkeypatch):
    """`memlab run` looks at the error that ended a script, as Python's `-i` would."""
    addresses = []

    def failed():
        hidden = torch.ones(5)
        addresses.append(hidden.data_ptr())
        raise ValueError

    try:
        failed()
    except ValueError as error:
        monkeypatch.setattr(sys, "last_value", error, raising=False)
        monkeypatch.setattr(sys, "last_traceback", error.__traceback__, raising=False)
    [holder] = find_holders(addresses, device="cpu")
    assert holder.kind == "traceback" and "kept by the last error" in holder.path
    assert holder.frees is None
