"""Seconds of a step. No test here rests on how fast the machine is: the clock is made up."""

from types import SimpleNamespace

import pytest
import torch

from memlab import measure, timing
from memlab.timing import Seconds, time_step, time_together


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock.now` is set."""
    made_up = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: made_up.now))
    return made_up


def test_runs_are_timed_in_turn_after_a_warm_up(clock):
    turns = []

    def build_run(name):
        seconds = iter({"a": [9, 1, 5, 2], "b": [8, 3, 3, 3]}[name])

        def step():
            turns.append(name)
            clock.now += next(seconds)

        return step

    times = time_together({name: lambda name=name: build_run(name) for name in "ab"}, repeats=3)
    assert turns == ["a", "b"] * 4
    assert times == {"a": (2, 4, 3), "b": (3, 0, 3)}


def test_a_long_step_needs_no_other_one_to_warm_up(clock):
    calls = []

    def step():
        calls.append(None)
        clock.now += 60

    assert time_together({"long": lambda: step}, repeats=3) == {"long": (60, 0, 3)}
    assert len(calls) == 3


def test_the_first_step_of_a_generator_builds_too_and_never_counts(clock):
    def train(rounds):
        clock.now += 1000
        for _ in range(rounds):
            clock.now += 2
            yield None

    options = {"rounds": 4}
    assert time_together({"": train}, repeats=3, options=options) == {"": (2, 0, 3)}
    with pytest.raises(ValueError, match="ended after 4 steps"):
        time_together({"": train}, repeats=4, options=options)


def test_seconds_are_asked_for_at_least_once():
    with pytest.raises(ValueError, match="repeats has to be at least 1, not 0"):
        time_together({}, repeats=0)


def test_one_step(clock):
    def step():
        clock.now += 3

    assert time_step(step, torch.device("cpu")) == 3


def test_seconds_in_words():
    assert str(Seconds(0.25, 0.03, 5)) == "0.25 s (spread 0.03 s over 5)"


def test_a_measurement_carries_them():
    assert measure(lambda: lambda: None, repeats=2, device="cpu").seconds.repeats == 2
