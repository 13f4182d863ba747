"""What steps leave behind, by place; and what they leave on the host's heap."""

import pytest

from memlab.growth import growth_of, host_growth
from memlab.ledger import Block, Ledger, Step
from tests.test_verdict import steps


def test_what_the_steps_leave_is_summed_by_place():
    blocks = []
    for number in range(1, 5):
        born = 10 * number + 1
        for address in (1, 2):
            block = Block(64, 10 * number + address, born, None, "activations", "forward", "head")
            block.operator, block.kept_from = "aten::linear", 10 * number + 10
            block.line = "train.py:3"
            blocks.append(block)
    ledger = Ledger(blocks, start=0, end=60)
    run = [Step(number, 10 * number, 10 * number + 10) for number in range(1, 5)]
    [growth] = growth_of(ledger, run)
    assert (growth.column, growth.place) == (
        "activations",
        "aten::linear in head at train.py:3",
    )
    assert growth.bytes_a_step == 128
    assert growth.addresses == (21, 22, 31, 32)

    blocks[3].line = "train.py:7"
    both = growth_of(ledger, run)
    assert [(part.line, part.bytes_a_step) for part in both] == [
        ("train.py:3", 96),
        ("train.py:7", 32),
    ]


def steps_that_leave(a_step):
    """Two steps that were recorded, and 17 that were not, with bytes on the heap."""
    cheap = [Step(number, 0, 1, (), 10**6 + a_step * number) for number in range(3, 20)]
    return [*steps([90, 100], [50, 50], host=[0, 10**6]), *cheap]


@pytest.mark.parametrize("a_step, said", [(40_000, 40_000), (100, None)])
def test_the_hosts_heap_is_read_from_steps_that_were_not_recorded(a_step, said):
    assert host_growth(steps_that_leave(a_step)) == said
    assert host_growth(steps([90] * 12, [50] * 12, host=list(range(0, 12 * 10**6, 10**6)))) is None
