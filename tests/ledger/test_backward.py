"""What a forward leaves for its backward."""

from memlab.ledger import Block, Ledger, Span, activations_at_backward

STEP = [Span(0, 10, "forward"), Span(10, 20, "backward")]


def held(born, died, size=1, column="activations"):
    return Block(size, 0, born, died, column=column)


def test_what_is_alive_when_backward_begins():
    blocks = [
        held(1, 12),
        held(2, None, 2),
        held(10, 11, 4),  # at that very moment
        held(3, 10, 8),  # gone by then
        held(11, 12, 16),  # recomputed
        held(1, 30, 32, column="batch"),
    ]
    assert activations_at_backward(Ledger(blocks, STEP)) == 7
    assert activations_at_backward(Ledger([], STEP)) == 0
    assert activations_at_backward(Ledger(blocks, STEP[:1])) is None


def test_of_several_backwards_the_most():
    again = [Span(30, 40, "forward"), Span(40, 50, "backward")]
    blocks = [held(1, 12), held(31, 45, 5), held(32, 45, 5)]
    assert activations_at_backward(Ledger(blocks, STEP + again)) == 10


def test_an_optimizer_inside_a_backward_begins_no_other():
    goes_on = [Span(0, 10, "forward"), Span(10, 15, "backward"), Span(15, 16, "optimizer")]
    goes_on.append(Span(16, 20, "backward"))
    assert activations_at_backward(Ledger([held(1, 20), held(12, 18, 100)], goes_on)) == 1
