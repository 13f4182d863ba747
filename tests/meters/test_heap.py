"""The bytes in use on the host's heap."""

import ctypes
import gc
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from memlab.meters import heap
from memlab.meters.heap import heap_in_use


@pytest.fixture(autouse=True)
def _no_garbage():
    """What other tests have left is not collected while this one counts."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


pytestmark = pytest.mark.skipif(heap_in_use() is None, reason="this allocator does not say")

SLACK = 64 * 1024  # what the interpreter does in between


def test_an_array_is_on_the_heap_until_it_is_freed():
    before = heap_in_use()
    array = np.zeros(1_000_000)
    assert array.nbytes <= heap_in_use() - before < array.nbytes + SLACK
    del array
    assert abs(heap_in_use() - before) < SLACK


def test_it_is_no_resident_size():
    """What is taken and given back again leaves no mark, however the system counts it."""
    before = heap_in_use()
    for _ in range(20):
        arrays = [np.ones(10_000) for _ in range(50)]
    del arrays
    assert abs(heap_in_use() - before) < SLACK


def kept_a_step(keep, steps=100):
    """Bytes by which the heap grows a step while a 24-layer network is trained."""
    layers = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    total = torch.zeros(())
    for step in range(steps):
        if step == steps // 2:
            before = heap_in_use()
        loss = model(torch.ones(4, 16)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += keep(loss)
    return (heap_in_use() - before) / (steps - steps // 2)


def test_the_nodes_of_a_kept_graph_are_on_the_heap():
    assert kept_a_step(lambda loss: loss) > 10_000
    assert abs(kept_a_step(lambda loss: loss.detach())) < 2_000


def test_another_allocator_does_not_say(monkeypatch):
    class Library:
        """glibc while another allocator stands in for its own: its heap is empty."""

        def mallinfo2():
            return heap._Mallinfo2()

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert heap._glibc()() is None
    del Library.mallinfo2  # as in a library that does not know it
    assert heap._glibc() is None


def test_the_most_that_python_held_is_seen_whatever_is_left_of_it():
    def act():
        kept = [np.ones(2**17), bytes(2**20)]
        kept.pop()
        return np.ones(2**16)

    most = heap.most_held_by_python(act)
    assert 2**21 <= most < 2**21 + 2**16
    assert not tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        assert abs(heap.most_held_by_python(act) - most) < 2**16 and tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
