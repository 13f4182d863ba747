"""`train.py:train`: a function out of a file, and what a file can do wrong."""

import sys

import pytest

from memlab.commands.load import ScriptFailed, loaded


@pytest.fixture
def script(tmp_path):
    def write(source, name="train.py"):
        (tmp_path / name).write_text(source)
        return f"{tmp_path / name}:train"

    return write


def test_a_file_is_run_as_a_module_of_its_own(script):
    script("size = 3", "of_load_test.py")
    text = script(
        "import sys\nfrom of_load_test import size\n"
        "def train():\n    return size, __name__, sys.argv\n"
        "if __name__ == '__main__':\n    raise SystemExit"
    )
    before = sys.argv, sys.path[:], set(sys.modules)
    with loaded(text) as train:
        size, name, arguments = train()
    assert size == 3 and name != "__main__" and arguments == [text.removesuffix(":train")]
    assert (sys.argv, sys.path, set(sys.modules)) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.py", "with a colon: train.py:train"),
        (":train", "with a colon: train.py:train"),
        ("train.py:", "with a colon: train.py:train"),
        ("none.py:train", "there is no file none.py"),
        ("notes.txt:train", "its name does not end in .py"),
        ("train.py:learn", "no function 'learn'. It has: train, helper"),
        ("train.py:size", "size in train.py is no function, but int"),
        ("empty.py:train", "It has: none"),
    ],
)
def test_what_is_no_function_in_a_file_is_refused(script, tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    script("from math import sin\nsize = 3\ndef train(): ...\ndef helper(): ...\n")
    script("", "notes.txt")
    script("", "empty.py")
    with pytest.raises(ValueError, match=said), loaded(text):
        pass


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere"),
        ("def train(:", "SyntaxError"),
        ("raise SystemExit('no data')", "SystemExit: no data"),
        ("def train():\n    raise ValueError('mine')", "line 2, in train"),
    ],
)
def test_an_error_of_the_file_comes_with_its_own_traceback(script, source, said):
    with pytest.raises(ScriptFailed) as caught, loaded(script(source)) as train:
        train()
    shown = str(caught.value)
    assert said in shown and "train.py" in shown and "memlab/commands" not in shown


def test_an_error_that_is_not_of_the_file_stays_what_it_is(script):
    with pytest.raises(ValueError, match="not the file's"):
        with loaded(script("def train(): ...")):
            raise ValueError("not the file's")
