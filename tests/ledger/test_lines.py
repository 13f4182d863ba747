"""Lines and blocks joined: made-up spans."""

from memlab.ledger.blocks import Block
from memlab.ledger.lines import note_lines
from memlab.ledger.spans import Span, Spans


def line_at(born, *spans):
    block = Block(1, 1, born)
    note_lines([block], Spans(spans))
    return block.line


FORWARD = (
    Span(10, 20, "line", "train.py:1"),
    Span(20, 30, "line", "train.py:2"),
    Span(11, 19, "operator", "aten::mul", sequence=5),
    Span(15, 16, "operator", "aten::empty", sequence=6),  # it runs when the node is there
    Span(21, 29, "operator", "aten::exp", sequence=6),
    Span(40, 90, "line", "train.py:3"),
    Span(50, 60, "backward", "ExpBackward0", sequence=6),
    Span(60, 70, "backward", "MulBackward0", sequence=5),
    Span(70, 80, "backward", "AccumulateGrad"),
)


def test_forward():
    assert line_at(12, *FORWARD) == "train.py:1"
    assert line_at(5, *FORWARD) == line_at(35, *FORWARD) == ""
    assert line_at(12) == ""  # no lines were noted


def test_the_middle_of_the_operator_counts_since_clocks_differ():
    late = Span(29, 39, "operator", "aten::sin")
    assert line_at(29, *FORWARD[:2], Span(30, 40, "line", "train.py:4"), late) == "train.py:4"


def test_backward_has_the_line_of_the_operator_that_made_the_node():
    assert line_at(55, *FORWARD) == "train.py:2 (backward)"
    assert line_at(65, *FORWARD) == "train.py:1 (backward)"
    assert line_at(75, *FORWARD) == "train.py:3"  # of no operator: the line that called backward


def test_what_runs_again_in_backward_has_its_own_line():
    again = Span(52, 58, "line", "train.py:1")
    operator = Span(53, 57, "operator", "aten::mul", sequence=9)
    assert line_at(54, *FORWARD, again, operator) == "train.py:1"
