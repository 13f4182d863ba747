"""The buckets of DistributedDataParallel, from blocks and spans alone."""

import pytest

from memlab.ledger import BUCKET, Block, Event, Span, build_ledger
from memlab.ledger.buckets import tell_buckets
from memlab.ledger.spans import Spans

REDUCER = Spans([Span(10, 20, "reducer")])


def told(**changes):
    block = Block(**{"bytes": 64, "address": 1, "born": 12, "operator": "aten::empty"} | changes)
    before = Block(64, -1, 0, column="gradients", name=BUCKET)
    tell_buckets([block], [before], REDUCER)
    return block.column, block.name, before.died


def test_what_the_reducer_asks_for_and_keeps_is_a_bucket_and_ends_the_one_before():
    assert told() == ("gradients", BUCKET, 12)
    assert told(column="gradients") == ("gradients", BUCKET, 12)  # a gradient is a view of it


def test_the_buckets_of_another_wrapper_stay():
    new = [Block(64, 1, 12, operator="aten::empty"), Block(32, 2, 13, operator="aten::empty")]
    other, same = (Block(size, -1, 0, column="gradients", name=BUCKET) for size in (98, 96))
    tell_buckets(new, [other, same], REDUCER)
    assert (other.died, same.died) == (None, 12)


def test_all_else_is_none():
    nothing = Block(1, 1, 0).column, "", None
    assert told(born=9) == nothing
    assert told(died=19) == nothing
    assert told(operator="aten::mm") == nothing
    assert told(column="parameters") == ("parameters", "", None)


@pytest.mark.parametrize("handed_out_again", [[], [Event(40, 1, 32), Event(41, 1, -32)]])
def test_what_was_sent_is_gone_though_nobody_saw_it_go(handed_out_again):
    events = [Event(12, 1, 64), *handed_out_again]
    spans = [Span(11, 13, "operator", "aten::flatten_dense_tensors"), *REDUCER]
    ledger, _ = build_ledger(events, spans=spans, start=0, end=100)
    sent = ledger.blocks[0]
    assert (sent.column, sent.died) == ("temporaries", 20)
