"""Steps: what each needed, and what it left."""

from memlab.ledger import Block, Counted, Ledger, Step, left_by, numbers_in, steps_in

LEDGER = Ledger(
    [
        Block(100, 1, 0, None, "parameters"),
        Block(30, 2, 12, 18, "activations"),
        Block(8, 3, 13, None, "activations", kept_from=20),
        Block(5, 4, 19, 29, "batch"),  # for the next step
        Block(50, 5, 22, 28, "temporaries"),
        Block(8, 6, 23, None, "activations", kept_from=30),
        Block(2, 7, 24, 31, "activations", kept_from=30),  # a loop's variable
    ],
    start=0,
    end=40,
)
COUNTED = [
    Counted(1, 10, 20, ((4, 8),), 7),
    Counted(2, 20, 30, ((4, 8), (9, 8))),
    Counted(3, 30, 40),
]


def test_what_each_step_needed_and_left():
    first, second, third = steps_in(LEDGER, COUNTED)
    assert (first.peak_bytes, second.peak_bytes, third.peak_bytes) == (138, 173, 118)
    assert (first.bytes_after, second.bytes_after, third.bytes_after) == (113, 118, 116)
    assert (first.bytes_left, second.bytes_left, third.bytes_left) == (108, 118, 116)
    assert first.columns_after["kept"] == 8
    assert (first.host_bytes, second.host_bytes) == (7, None)
    assert second.largest_shape == (9, 8)
    assert third.largest_shape == ()


def test_a_step_that_lies_outside_was_not_recorded():
    assert steps_in(LEDGER, [Counted(4, 35, 45, ((1,),))]) == [Step(4, 35, 45, ((1,),))]


def test_left_are_blocks_that_outlive_the_step_after_theirs():
    left = left_by(LEDGER, steps_in(LEDGER, COUNTED))
    assert [(step.number, block.address) for step, block in left] == [(1, 3), (2, 6)]


def test_the_numbers_of_a_shape():
    assert (numbers_in((4, 8)), numbers_in(())) == (32, 1)
