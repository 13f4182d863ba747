"""A storage is noted once, when it gets another size, and when it is gone."""

import torch

from memlab.meters.fake_storages import FakeStorages
from memlab.meters.scratch import Scratch


def noted():
    events = []
    storages = FakeStorages(lambda device, made: events.append((device, made.size, made.address)))
    return storages, events


def test_a_storage_has_one_address_until_it_is_gone():
    storages, events = noted()
    tensor = torch.zeros(4)
    storages.see(tensor)
    storages.see(tensor.view(2, 2))
    address = storages.address_of(tensor.untyped_storage())
    assert address and storages.address_of(torch.zeros(1).untyped_storage()) == 0
    del tensor
    assert events == [("cpu", 16, address), ("cpu", -16, address)]


def test_another_size_is_an_end_and_a_birth():
    storages, events = noted()
    tensor = torch.zeros(4)
    storage = tensor.untyped_storage()
    storages.see(tensor)
    for size in (0, 0, 32):
        storage.resize_(size)
        storages.note_size(storage)
    del tensor, storage
    assert [size for _, size, _ in events] == [16, -16, 32, -32]


def test_the_parts_of_a_sparse_tensor():
    storages, events = noted()
    storages.see(torch.eye(2).to_sparse())
    assert sorted(size for _, size, _ in events if size > 0) == [8, 32]


def test_what_a_kernel_takes_is_gone_at_its_end():
    storages, events = noted()
    storages.take([Scratch(1024), Scratch(512)])
    assert sum(size for _, size, _ in events) == 0
    assert {device for device, _, _ in events} == {"cuda"}
    assert len({address for _, _, address in events}) == 2


def test_moments_rise():
    storages, _ = noted()
    moments = [storages.now() for _ in range(100)]
    assert moments == sorted(set(moments))
