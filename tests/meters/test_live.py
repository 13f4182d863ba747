"""Which tensors are alive, and in which storages their bytes are."""

import sys

import torch
from torch import nn

from memlab.meters.live import live_objects, live_storages, storages, tensors_in

CPU = torch.device("cpu")
FLOAT = 4


def test_tensors_in_finds_every_tensor_once():
    from collections import OrderedDict, UserDict, namedtuple

    a, b, c, d = (torch.ones(1) for _ in range(4))
    pair = namedtuple("pair", "x y")
    looped = [a]
    looped.append(looped)
    value = {
        "1": looped,
        "2": pair(b, None),
        "3": UserDict({"k": OrderedDict(q=[c])}),
        "4": ({"z"}, 3, "text"),
        "5": d,
    }
    assert sorted(map(id, tensors_in(value))) == sorted(map(id, (a, b, c, d)))


def test_tensors_in_goes_as_deep_as_need_be():
    deep = [torch.ones(1)]
    for _ in range(10 * sys.getrecursionlimit()):
        deep = [deep]
    assert len(list(tensors_in(deep))) == 1


def test_storages_of_all_layouts():
    dense = torch.ones(4, 4)
    assert [s.nbytes() for s in storages(dense[1:])] == [64]
    assert sum(s.nbytes() for s in storages(torch.eye(3).to_sparse())) == 2 * 3 * 8 + 3 * FLOAT
    rows, columns, values = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2]), torch.ones(3)
    compressed = torch.sparse_csr_tensor(rows, columns, values, (3, 3), check_invariants=True)
    assert sum(s.nbytes() for s in storages(compressed)) == (4 + 3) * 8 + 3 * FLOAT
    assert list(storages(torch.ones(3, device="meta"))) == []


def test_live_storages_leave_memory_maps_out(tmp_path):
    before = sum(storage.nbytes() for storage in live_storages(CPU).values())
    mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=100_000, dtype=torch.uint8)
    owned = torch.ones(10_000, dtype=torch.uint8)
    view = owned[:10]
    now = sum(storage.nbytes() for storage in live_storages(CPU).values())
    assert now - before == 10_000
    del mapped, view


def test_live_objects_are_found_by_class():
    module = nn.Linear(2, 2)
    found = live_objects(nn.Module)
    assert any(thing is module for thing in found)
    assert all(isinstance(thing, nn.Module) for thing in found)


# The observer -------------------------------------------------------------------------------------
