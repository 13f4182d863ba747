"""An operator's scratch: what it takes for itself, and gives back before it is done."""

from memlab.ledger import Span, build_ledger
from tests.ledger.made_up import alive


def scratch_of(died: int | None, *names: str) -> bool:
    """Whether a block born at 50 is scratch, inside calls of these names: 10-90, 20-80, 30-70..."""
    calls = [Span(10 * i, 100 - 10 * i, "operator", name) for i, name in enumerate(names, 1)]
    ledger, _ = build_ledger(alive(50, 1, 8, died), spans=calls)
    return ledger.blocks[0].scratch


def test_scratch_comes_back_before_the_operator_that_asked_is_over():
    assert scratch_of(90, "aten::mm")
    assert not scratch_of(91, "aten::mm")
    assert not scratch_of(None, "aten::mm")
    assert not scratch_of(60)


def test_who_asked_is_the_innermost_operator_that_does_more_than_hand_out_memory():
    for allocator in ("aten::empty", "aten::zeros", "aten::empty_strided", "aten::resize_"):
        assert scratch_of(90, "aten::mm", allocator)
    assert not scratch_of(90, "aten::linear", "aten::mm")  # a tensor between two operators
    assert not scratch_of(90, "aten::mm", "aten::clone", "aten::empty_like", "aten::empty")
    assert not scratch_of(60, "aten::empty")  # torch.empty(), by whoever


def test_with_clocks_that_differ_no_scratch_is_told():
    """On CUDA the history counts in microseconds: a block's operator is a guess."""
    call = Span(10, 90, "operator", "aten::mm")
    for one_clock in (True, False):
        ledger, _ = build_ledger(alive(50, 1, 8, 60), spans=[call], one_clock=one_clock)
        assert ledger.blocks[0].scratch == one_clock


def test_what_autograd_calls_is_no_operator_that_takes_scratch():
    for name in ("MulBackward0", "MyFunction", "torch::autograd::AccumulateGrad"):
        assert not scratch_of(60, name, "aten::empty")
        assert scratch_of(60, name, "aten::mm", "aten::empty")
