"""A method of a class, watched by several, who may leave in any order."""

import contextlib
import time

import pytest

from memlab.meters.listening import method_watched


class Counter:
    def add(self, number):
        return number + 1


def test_each_listener_is_told_after_the_call_until_it_leaves():
    before = Counter.add
    counter = Counter()
    first, second = [], []
    outer, inner = contextlib.ExitStack(), contextlib.ExitStack()
    outer.enter_context(method_watched(Counter, "add", lambda *told: first.append(told)))
    inner.enter_context(method_watched(Counter, "add", lambda *told: second.append(told)))
    assert counter.add(1) == 2
    outer.close()
    assert counter.add(number=2) == 3
    inner.close()
    assert counter.add(3) == 4
    assert Counter.add is before
    assert [result for result, _ in first] == [2]
    assert [result for result, _ in second] == [2, 3]
    assert all(0 < began <= time.time_ns() for _, began in second)


def test_a_call_that_raises_tells_nobody():
    told = []
    with method_watched(Counter, "add", lambda *each: told.append(each)), pytest.raises(TypeError):
        Counter().add("one")
    assert told == []
