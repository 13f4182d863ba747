"""What has a name: variables of running functions, of modules."""

import sys
import threading
import types
import weakref

import torch

from memlab.holders import roots
from memlab.holders.roots import find_roots, name_of_function, place_in, variables


def test_a_variable_of_a_running_function_has_a_name():
    held = [1]

    def inner(given):
        other = given
        return [root.name for root in find_roots().of(other)], held

    # The outermost function first; `held` is only lent to the one inside.
    assert inner(held)[0] == ["held", "given", "other"]


def test_a_variable_of_another_thread_has_a_name():
    ready, done = threading.Event(), threading.Event()
    things = []

    def work():
        held = [1]
        things.append(weakref.ref(threading.current_thread()))
        things.append(id(held))
        ready.set()
        done.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(60)
    try:
        assert [root.name for root in find_roots().names[things[1]]] == ["held"]
    finally:
        done.set()
        thread.join()


def test_the_variables_are_not_kept_by_the_frame():
    held = torch.ones(3)
    reference = weakref.ref(held)
    assert variables(sys._getframe())["held"] is held
    find_roots()
    del held
    assert reference() is None


def test_a_module_of_the_user_is_told_from_a_library(tmp_path):
    mine = types.ModuleType("mine")
    mine.__file__ = str(tmp_path / "mine.py")
    mine.cache = {"x": torch.ones(1)}
    theirs = types.ModuleType("theirs")
    theirs.__file__ = torch.__file__
    theirs.cache = {"x": torch.ones(1)}
    sys.modules |= {"mine": mine, "theirs": theirs}
    try:
        found = find_roots()
        [root] = found.of(mine.cache)
        assert (root.name, root.where, root.frees) == ("cache", "in module mine", "del cache")
        assert found.of(theirs.cache) == [] and id(vars(theirs)) in found.libraries
        found.add_library(vars(theirs), theirs.cache)
        [root] = found.of(theirs.cache)
        assert (root.where, root.weight, root.frees) == ("in module theirs", 1, None)
    finally:
        del sys.modules["mine"], sys.modules["theirs"]


def test_the_place_of_a_variable_is_the_line_that_first_sets_it():
    def function(given):
        class Box:
            other = 1

        Box.held = 2
        held = 3
        held = 4
        return held

    code = function.__code__
    assert name_of_function(code) == "function"
    line = code.co_firstlineno
    assert place_in(code, "held") == f"in function() at test_roots.py:{line + 5}"
    assert place_in(code, "given") == f"in function() at test_roots.py:{line}"
    script = compile("x = 1\ny = 2\n", "train.py", "exec")
    assert place_in(script, "y") == "at train.py:2"


def test_without_a_notebook_there_is_no_shell(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert roots.notebook() is None
