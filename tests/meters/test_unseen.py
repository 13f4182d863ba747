"""What is carried from one recording to the next."""

import torch

from memlab.ledger import Block, Ledger
from memlab.meters import unseen
from memlab.meters.unseen import LEAST_BY_HEAP, Unseen


class Recording:
    """Notes what it is told."""

    def __init__(self):
        self.noted = []

    def note_unseen(self, size, column, name):
        self.noted.append((size, column))


def noted(monkeypatch, *, alive, held, heap_moves):
    """What is noted after a recording left `alive` bytes of which tensors hold `held`, and the heap
    has moved since then.
    """
    heaps = iter([10**9, 10**9 + heap_moves])
    monkeypatch.setattr(unseen, "heap_in_use", lambda: next(heaps))
    monkeypatch.setattr(Unseen, "held", lambda self: 0)
    carried = Unseen(torch.device("cpu"))
    carried.recorded(Ledger([Block(alive, 1, 0)], end=1), held)
    recording = Recording()
    carried.note_in(recording)
    return recording.noted


def test_what_a_graph_saved_is_known_to_the_byte(monkeypatch):
    assert noted(monkeypatch, alive=100, held=60, heap_moves=0) == [(40, "kept")]
    assert noted(monkeypatch, alive=60, held=60, heap_moves=0) == []


def test_what_came_since_then_is_known_by_the_heap_alone(monkeypatch):
    size = LEAST_BY_HEAP
    assert noted(monkeypatch, alive=0, held=0, heap_moves=size) == [(size, "unattributed")]
    assert noted(monkeypatch, alive=0, held=0, heap_moves=size - 1) == []


def test_where_the_heap_does_not_say_nothing_is_guessed(monkeypatch):
    monkeypatch.setattr(unseen, "heap_in_use", lambda: None)
    carried, recording = Unseen(torch.device("cpu")), Recording()
    carried.note_in(recording)
    assert recording.noted == []
