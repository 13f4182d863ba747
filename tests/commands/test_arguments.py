"""Options of a run, from the shell."""

from memlab.commands.arguments import options_of


def test_a_value_is_read_as_python_or_is_a_text():
    texts = ["batch=8", "rate=1e-3", "on=True", "sizes=[1, 2]", "name=gpt=2", "none=None", "a="]
    assert options_of(texts) == {
        "batch": 8,
        "rate": 1e-3,
        "on": True,
        "sizes": [1, 2],
        "name": "gpt=2",
        "none": None,
        "a": "",
    }
