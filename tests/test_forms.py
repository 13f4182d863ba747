"""What the files that memlab keeps have in common."""

import pytest
from pydantic import ValidationError

from memlab.forms import Count, Model, in_words, replace


class Line(Model):
    count: Count


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "count: Field required"),
        ({"count": 0}, "count: Input should be greater than or equal to 1, not 0"),
        ({"count": "1"}, "count: Input should be a valid integer, not '1'"),
        ({"count": 1, "sum": 2}, "sum: Extra inputs are not permitted, not 2"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fields, words):
    with pytest.raises(ValidationError) as error:
        Line(**fields)
    assert in_words(error.value) == words


def test_an_interrupted_run_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "kept.txt"
    replace(path, "old")

    def fails(*arguments):
        raise OSError("full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="full"):
        replace(path, b"half")
    assert path.read_text() == "old"
