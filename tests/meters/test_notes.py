"""Notes: observations that the garbage collector does not count."""

import gc

from memlab.ledger import Observation
from memlab.meters.notes import Notes


def test_what_is_noted_comes_back_in_its_order():
    notes = Notes()
    notes.add(1, 16, "batch", "input", ("float32", (2, 3), "", ""))
    notes.add(2, 32, "parameters", "a.weight", (None, None, "Linear", "trained"))
    assert notes.observations() == [
        Observation(1, 16, "batch", "input", "float32", (2, 3)),
        Observation(2, 32, "parameters", "a.weight", None, None, "Linear", "trained"),
    ]


def test_a_thousand_notes_are_no_objects_of_the_collector():
    notes = Notes()
    kind = (None, None, "", "")
    notes.add(0, 0, "", "", kind)
    gc.collect()
    before = len(gc.get_objects())
    for number in range(1000):
        notes.add(number, number, "batch", "", kind)
    assert len(gc.get_objects()) - before < 100
