"""Storages that a run used, followed until they are gone."""

import torch

from memlab.meters.uses import Uses


def test_a_storage_is_noted_once_and_its_end_is_seen():
    uses = Uses()
    tensor = torch.ones(10)
    for now in (5, 6):
        uses.note(tensor.untyped_storage(), tensor.data_ptr(), now)
    [use] = uses.found
    assert (use.bytes, use.seen, use.gone, use.shared) == (40, 5, None, False)
    del tensor
    assert use.gone is not None


def test_at_the_address_of_one_that_is_gone_lies_another():
    uses = Uses()
    first, second = torch.ones(10), torch.ones(10)
    uses.note(first.untyped_storage(), 7, 5)
    del first
    uses.note(second.untyped_storage(), 7, 6)
    assert [use.seen for use in uses.found] == [5, 6]
    uses.end()
    del second
    assert uses.found[1].gone is None
