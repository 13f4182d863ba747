"""Whose code a file is."""

import json
import sys

import pytest
import torch

import memlab
from memlab.meters.user_code import is_memlab, is_user_code, place_of


@pytest.mark.parametrize(
    ("file", "is_users"),
    [
        (__file__, True),
        ("train.py", True),
        ("<stdin>", True),
        ("<ipython-input-3-0f5e>", True),
        ("<frozen importlib._bootstrap>", False),
        ("<string>", False),
        ("<eval_with_key>.1", False),
        (memlab.__file__, False),
        (torch.__file__, False),
        (pytest.__file__, False),
        (json.__file__, False),
        (sys.executable.replace("python", "torchrun"), False),
    ],
)
def test_the_users_code_is_told_from_a_librarys(file, is_users):
    assert is_user_code(file) == is_users


def test_memlabs_own_code():
    assert is_memlab(memlab.__file__) and not is_memlab(__file__)


def test_the_place_of_a_line():
    assert place_of(__file__, 12) == "test_user_code.py:12"
