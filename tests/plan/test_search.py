"""The first switches that fit, over a run whose bytes are known."""

import dataclasses
import logging

import pytest
import torch

from memlab import plan
from memlab.units import MiB

CONTEXT = 516 * MiB  # of a GPU that is a size alone


def steps_of(weight):
    while True:
        yield weight[:1].sum()


def train(batch=1, fused_loss=False, checkpoints=False, state_far=False, other=False):
    """32 MiB, of which the switches take off 4, 2 and 16."""
    size = 32 - 4 * fused_loss - 2 * checkpoints - 16 * state_far
    yield from steps_of(torch.zeros(size * MiB // 4, device="cuda", requires_grad=True))


def planned(size, run=train, **options):
    # The process needs the context, its tensors, and 2 MiB for what is small.
    return plan(run, gpu=CONTEXT + (size + 2) * MiB, progress=False, **options)


def test_what_fits_needs_no_switch():
    found = planned(40)
    assert found and found.fits and found.switches == ()
    assert found.before is found.after
    assert found.code == "train(batch=1)\n"


def test_the_first_combination_that_fits_and_what_each_switch_took():
    found = planned(29)
    assert found.switches == ("fused loss",)
    assert [(rung.switch, rung.took_bytes) for rung in found.rungs] == [
        (None, None),
        ("fused loss", 4 * MiB),
    ]
    assert found.code == "train(batch=1, fused_loss=True)\n"
    assert found.before.allocated_bytes - found.after.allocated_bytes == 4 * MiB


def test_what_costs_time_and_is_not_needed_is_left_out():
    found = planned(13)
    assert found.switches == ("fused loss", "optimizer state offloading")
    assert [rung.switch for rung in found.rungs if rung.off] == ["checkpoints"]
    assert "left out: it fits without" in str(found)


def test_where_nothing_fits_the_least_is_said():
    found = planned(4)
    assert not found and found.switches == (
        "fused loss",
        "checkpoints",
        "optimizer state offloading",
    )
    assert not any(rung.off for rung in found.rungs)
    said = str(found)
    assert "does not fit" in said and "6.00 MiB too much" in said and "several GPUs" in said


def test_what_others_hold_counts():
    assert planned(33, in_use="2 MiB").switches == ("fused loss",)


def test_a_model_whose_state_alone_is_too_large_is_not_predicted(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    tried = []

    def predict(run, gpu, progress):
        tried.append(run)
        return dataclasses.replace(nothing, gpu=gpu)

    nothing = planned(40).after
    monkeypatch.setitem(plan.__globals__["_Search"].predict.__globals__, "predict", predict)
    # 2 million parameters and more, 16 bytes each.
    found = plan(config, sequence=8, gpu=CONTEXT + 1 * MiB, progress=False)
    assert [rung.predicted for rung in found.rungs] == [True] + 9 * [False] + [True]
    assert found.rungs[1].needed_bytes > CONTEXT + 16 * 2 * MiB
    assert len(tried) == 2
    every = plan(config, sequence=8, gpu=CONTEXT + 1 * MiB, progress=False, every=True)
    assert all(rung.predicted for rung in every.rungs)


def test_what_libraries_say_is_shown_of_a_persons_run_alone(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=1)
    heard = []

    def predict(run, gpu, progress, **options):
        heard.append(logging.getLogger("transformers").isEnabledFor(logging.WARNING))
        return dataclasses.replace(nothing, gpu=gpu)

    nothing = planned(40).after
    monkeypatch.setitem(plan.__globals__["_Search"].predict.__globals__, "predict", predict)
    plan(config, sequence=8, gpu="T4", progress=False)
    planned(40)
    assert heard == [False, True]


def test_an_error_of_the_run_says_what_was_on():
    def fails(batch=1, fused_loss=False):
        assert not fused_loss, "mine"
        yield from steps_of(torch.zeros(32 * MiB // 4, device="cuda", requires_grad=True))

    with pytest.raises(AssertionError, match="mine") as caught:
        planned(16, fails)
    assert caught.value.__notes__ == ["plan() tried: fused loss."]
