"""Which of several sightings of one block counts."""

from memlab.ledger import Observation, build_ledger
from tests.ledger.made_up import alive


def type_seen(*seen):
    """The data type and the shape that one block gets from these sightings."""
    observations = [Observation(10 + i, 1, *what) for i, what in enumerate(seen)]
    ledger, missed = build_ledger(alive(0, 1, 100, 90), observations)
    assert not missed
    return ledger.blocks[0].dtype, ledger.blocks[0].shape


def test_the_type_is_that_of_the_strongest_label_and_the_first_of_several():
    weight = ("parameters", "", "float32", (5, 5))
    output = ("", "", "float32", (25,))
    assert type_seen(output, weight, output) == ("float32", (5, 5))
    assert type_seen(output, ("", "", "float32", (1, 25))) == ("float32", (25,))
    assert type_seen(("parameters", "")) == (None, None)


def test_views_of_parts_tell_the_data_type_only_as_long_as_they_agree():
    part = ("", "", "float32", None)
    assert type_seen(part, part) == ("float32", None)
    assert type_seen(part, ("parameters", "", "bfloat16", None)) == ("mixed", None)
    assert type_seen(part, ("", "", "bfloat16", (50,)), part) == ("bfloat16", (50,))


def test_a_type_alone_is_no_label_and_is_never_missed():
    seen = [Observation(10, 1, "", "", "float32", (25,)), Observation(10, 7, "", "", "int64", (2,))]
    ledger, missed = build_ledger(alive(0, 1, 100, 90), seen)
    assert ledger.blocks[0].column == "temporaries" and not missed


def test_what_an_optimizer_holds_is_its_state_even_if_it_is_somebodys_buffer():
    buffer = Observation(10, 1, "parameters", "state", role="buffer")
    state = Observation(11, 1, "optimizer_state")
    weight = Observation(12, 1, "parameters", "weight", role="trained")
    for seen, column in (
        ([buffer, state], "optimizer_state"),
        ([state, buffer], "optimizer_state"),
        ([buffer, state, weight], "parameters"),
    ):
        ledger, _ = build_ledger(alive(0, 1, 100, 90), seen)
        assert ledger.blocks[0].column == column
