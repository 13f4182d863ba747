"""What is kept: alive after its step, and nobody's."""

from memlab.ledger import Observation, Span, build_ledger
from tests.ledger.made_up import TWO_STEPS, alive, by_address


def kept(*blocks, spans=TWO_STEPS, observations=()):
    """The blocks by address: their column, and from when they are kept."""
    events = sorted(event for block in blocks for event in block)
    ledger, _ = build_ledger(events, observations, spans, start=0)
    return {a: (block.column, block.kept_from) for a, block in by_address(ledger).items()}


def evaluation(calls: int) -> list[Span]:
    """Calls of a model without gradients: 100-150, 200-250 and so on; operators between them."""
    spans = [Span(10, 100 * calls + 99, "step")]
    for begin in range(100, 100 * calls + 100, 100):
        spans.append(Span(begin, begin + 50, "module", "model", 0, -1))
        spans.append(Span(begin + 60, begin + 62, "operator", "aten::cat"))
        spans.append(Span(begin + 70, begin + 72, "operator", "aten::argmax"))
    return spans


def test_what_a_step_made_is_kept_from_its_end_on():
    found = kept(
        alive(130, 1, 8, 450),  # autograd's, gone in its step
        alive(135, 2, 8, 1130),  # the loop's variable, until the next step sets it
        alive(140, 3, 8, None),  # a graph whose loss is in a list
        alive(320, 4, 8, None),  # a sum of gradients that is nobody's .grad
        alive(460, 5, 8, None),  # made in the optimizer's step, seen in no state
        alive(1140, 6, 8, None),
    )
    assert found == {
        1: ("activations", None),
        2: ("activations", 510),
        3: ("activations", 510),
        4: ("gradients", 510),
        5: ("optimizer_state", 510),
        6: ("activations", 1510),
    }


def test_a_batch_is_gone_when_the_forward_after_next_begins():
    found = kept(
        alive(50, 1, 8, 1050),  # targets, until the next batch is there
        alive(55, 2, 8, None),  # a data set
        alive(1055, 3, 8, None),  # the last targets
        spans=[
            *TWO_STEPS,
            Span(49, 51, "operator", "aten::randint"),
            Span(1054, 1056, "operator", "aten::randint"),
        ],
    )
    assert found == {1: ("batch", None), 2: ("kept", None), 3: ("batch", None)}


def test_what_is_owned_is_not_kept():
    blocks = [alive(130, address, 8, None) for address in range(1, 6)]
    columns = ("parameters", "optimizer_state", "gradients", "activations", "batch")
    seen = [Observation(140, address, column) for address, column in enumerate(columns, 1)]
    found = kept(*blocks, observations=seen)
    assert [found[address] for address in range(1, 5)] == [(column, None) for column in columns[:4]]
    assert found[5] == ("activations", 510)  # an output that is another module's input


def test_what_an_evaluation_collects_is_kept_from_its_birth():
    collected = [
        alive(161, 1, 80, 263),
        alive(261, 2, 160, 363),
        alive(361, 3, 240, 463),
        alive(461, 4, 320, 490),  # the last, which nothing follows
    ]
    others = [
        alive(171, 5, 8, 271),  # a variable that is set anew after each call
        alive(271, 6, 8, 371),
        alive(371, 7, 8, 471),
        alive(471, 8, 8, 490),
    ]
    found = kept(*collected, *others, spans=evaluation(4))
    assert [found[address] for address in range(1, 5)] == [("kept", None)] * 4
    assert [found[address][0] for address in range(5, 9)] == ["temporaries"] * 4
    assert [found[address][1] for address in range(5, 9)] == [200, 300, 400, None]


def test_outputs_in_a_list_are_kept_when_the_next_call_begins():
    found = kept(*(alive(100 * i + 10, i, 8, 450) for i in (1, 2, 3)), spans=evaluation(3))
    assert [found[i] for i in (1, 2)] == [("temporaries", 200), ("temporaries", 300)]
    assert found[3] == ("temporaries", 399)


def test_two_models_in_one_step_keep_nothing():
    """The reference's output is needed for the loss."""
    spans = [
        Span(5, 400, "step"),
        Span(10, 50, "module", "Reference", 0, -1),
        Span(60, 100, "module", "Policy", 0, 0),
        Span(110, 200, "backward", "Mm"),
    ]
    assert kept(alive(20, 1, 8, 190), spans=spans) == {1: ("activations", None)}


def test_without_phases_nothing_is_kept():
    assert kept(alive(10, 1, 8, None), spans=[Span(5, 20, "step")]) == {1: ("unattributed", None)}


def test_what_was_used_up_in_the_first_step_is_not_kept():
    """A state of random numbers, say, that lies there when a model is called for the first time."""
    seen = [Observation(60, 1, "kept"), Observation(60, 2, "kept")]
    found = kept(alive(50, 1, 8, 350), alive(55, 2, 8, None), observations=seen)
    assert [column for column, _ in found.values()] == ["batch", "kept"]
