"""What cannot be measured: every rule on made-up values."""

import dataclasses

import pytest
import torch

from memlab.ledger import COLUMNS, Block, Ledger, Observation, Span
from memlab.meters import refusals
from memlab.meters.readings import Readings
from memlab.meters.recorded import Recorded
from memlab.meters.uses import Use
from memlab.units import MiB

CPU = torch.device("cpu")
RECORDED = Recorded(
    device=CPU, readings=Readings([], [], one_thread=True), start=0, end=1000, thread=7
)


def recorded(**changes) -> Recorded:
    return dataclasses.replace(RECORDED, **changes)


def test_a_recording_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORDED.start = 1


@pytest.mark.parametrize(("used_at", "refused"), [(100, True), (200, False)])
def test_memory_that_a_model_from_before_has_given_back_is_not_that_model(used_at, refused):
    """A model from before was seen at an address, at 100. Used then, it is a stranger; later,
    another is there.
    """
    seen = recorded(before=frozenset({4096}), uses=[Use(4096, 64, used_at)])
    missed = [Observation(100, 4096, "parameters", "old.weight")]
    if not refused:
        refusals.refuse_foreign_parameters(seen, missed)
        return
    message = "64 B of its parameters would be missing .'old.weight' is one"
    with pytest.raises(ValueError, match=message):
        refusals.refuse_foreign_parameters(seen, missed)
    # Who counts what is alive has it in the ledger.
    refusals.refuse_foreign_parameters(dataclasses.replace(seen, counts_alive=True), missed)


def test_a_parameter_that_only_an_optimizer_knows_has_no_name():
    seen = recorded(before=frozenset({4096}), uses=[Use(4096, 64, 100)])
    with pytest.raises(ValueError, match="the optimizer's"):
        refusals.refuse_foreign_parameters(seen, [Observation(100, 4096, "parameters")])


def test_another_device():
    cuda = torch.device("cuda", 0)
    refusals.refuse_another_device(recorded())
    refusals.refuse_another_device(recorded(devices=frozenset({CPU, cuda})))
    with pytest.raises(ValueError, match="parameters are on cuda:0, but cpu is measured"):
        refusals.refuse_another_device(recorded(devices=frozenset({cuda})))


def test_another_thread_counts_only_where_the_meter_sees_one():
    refusals.refuse_other_threads(recorded(threads={7: "encoder"}))
    elsewhere = recorded(threads={7: "encoder", 8: "decoder"})
    with pytest.raises(RuntimeError, match="decoder ran in another thread"):
        refusals.refuse_other_threads(elsewhere)
    sees_all = Readings([], [], one_thread=False)
    refusals.refuse_other_threads(dataclasses.replace(elsewhere, readings=sees_all))


def test_nothing_to_train():
    refusals.refuse_nothing_to_train(recorded())
    with pytest.raises(ValueError, match="nothing in this step needs a gradient"):
        refusals.refuse_nothing_to_train(recorded(nothing_to_train=True))
    backward = Span(1, 2, "backward")
    refusals.refuse_nothing_to_train(recorded(nothing_to_train=True, spans=[backward]))


def left_over(size: int) -> Ledger:
    return Ledger([Block(size, 4096, 1, None, "activations"), Block(5 * MiB, 8192, 1, 2)])


def test_leaks():
    refusals.refuse_leaks(RECORDED, left_over(refusals.LEAK_TOLERANCE), {4096})
    with pytest.raises(refusals.MemoryLeakError, match=r"1.00 MiB .*activations 1.00 MiB"):
        refusals.refuse_leaks(RECORDED, left_over(MiB), {4096})


def test_what_no_tensor_holds_was_freed_where_the_meter_does_not_see():
    with pytest.raises(RuntimeError, match="another thread freed them"):
        refusals.refuse_leaks(RECORDED, left_over(MiB), {16})
    sees_all = recorded(readings=Readings([], []))
    with pytest.raises(refusals.MemoryLeakError):
        refusals.refuse_leaks(sees_all, left_over(MiB), {16})


def test_over_budget():
    block = Block(3 * MiB, 4096, 1, 2, "activations", module="blocks.0", operator="aten::mm")
    ledger = Ledger([block])
    columns = dict.fromkeys(COLUMNS, 0) | {"activations": 3 * MiB}
    refusals.refuse_over_budget(3 * MiB, 3 * MiB, columns, ledger)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        refusals.refuse_over_budget(2 * MiB, 3 * MiB, columns, ledger)
    error = raised.value
    assert isinstance(error, refusals.OverBudget) and error.measured
    assert (error.limit, error.asked, error.columns) == (2 * MiB, 3 * MiB, columns)
    assert error.place == "aten::mm in blocks.0"
    assert "aten::mm in blocks.0: 3.00 MiB at the measured peak." in str(error)
    with pytest.raises(refusals.OverBudget, match="the run: 3.00 MiB"):
        refusals.refuse_over_budget(2 * MiB, 3 * MiB, columns, Ledger([]))


def test_advice_names_no_notebook():
    assert tuple(refusals.ADVICE) == COLUMNS
    for advice in refusals.ADVICE.values():
        assert "notebook" not in advice
