"""Who holds a block now, after it was measured."""

import pytest
import torch
from torch import nn

from memlab import measure, watch
from memlab.ledger import Block

WIDTH = 96
SIZE = 4 * WIDTH * WIDTH


def left_in(measured, operator=""):
    """The blocks of one size that outlived the recording and came in it."""
    start = measured.ledger.start
    blocks = [block for block in measured.ledger.blocks if block.born > start]
    return [b for b in blocks if b.bytes == SIZE and b.died is None and operator in b.operator]


def test_a_block_is_held_until_it_is_let_go():
    kept = {}
    with watch() as w:
        kept["best"] = torch.ones(WIDTH, WIDTH)
        gone = torch.zeros(WIDTH, WIDTH)
        del gone
    measured = w.measurement
    [block] = left_in(measured)
    [holder] = measured.holders_of(block)
    assert holder.path.startswith("dict `kept` (1 entry) in test_a_block_is_held_until")
    assert measured.holders_of(block, limit=0) == []

    # What comes to its place is another block, however alike.
    kept["best"] = torch.ones(WIDTH, WIDTH)
    for number in range(8):
        kept[number] = torch.ones(WIDTH, WIDTH)
    with pytest.raises(ValueError, match="36,864 bytes any more: it was freed after it was"):
        measured.holders_of(block)
    freed = next(b for b in measured.ledger.blocks if b.bytes == SIZE and b.died is not None)
    with pytest.raises(ValueError, match="it was freed while it was measured"):
        measured.holders_of(freed)


def test_what_only_a_graph_holds():
    layer = nn.Linear(WIDTH, WIDTH)
    with watch(layer) as w:
        loss = layer(torch.ones(WIDTH, WIDTH)).exp().sum()
    measured = w.measurement
    [block] = left_in(measured, "exp")
    [holder] = measured.holders_of(block)
    assert holder.kind == "graph" and "`loss`" in holder.path

    del loss
    kept = [torch.ones(WIDTH, WIDTH) for _ in range(8)]
    with pytest.raises(ValueError, match="freed after it was measured, or C\\+\\+ alone"):
        measured.holders_of(block)
    del kept


def test_a_run_that_is_over_holds_nothing():
    def train():
        yield nn.Linear(WIDTH, WIDTH)(torch.ones(WIDTH, WIDTH)).sum()

    measured = measure(train, steps=1)
    for block in measured.largest():
        with pytest.raises(ValueError, match="as `measure` frees all that its run made"):
            measured.holders_of(block)
    for thing in (None, 12, torch.ones(1), measured.groups()):
        with pytest.raises(ValueError, match="takes a block of this measurement"):
            measured.holders_of(thing)


def test_a_block_from_before_the_watch():
    before = torch.ones(WIDTH, WIDTH)
    with watch() as w:
        pass
    address = before.untyped_storage().data_ptr()
    [block] = [b for b in w.measurement.ledger.blocks if b.address == address]
    assert isinstance(block, Block)
    assert "variable `before`" in w.measurement.holders_of(block)[0].path
