"""`compare`: what it takes, and what it refuses."""

import pytest
import torch

from memlab.compare import compare
from memlab.ledger import COLUMNS, Ledger
from memlab.measurement import Measurement
from memlab.units import MiB


def made(**columns):
    """A measurement with these bytes by column."""
    columns = dict.fromkeys(COLUMNS, 0) | columns
    return Measurement(sum(columns.values()), columns, "forward", Ledger([]), {"device": "cpu"})


BEFORE, AFTER = made(activations=90 * MiB), made(activations=10 * MiB)


def test_a_run_is_measured():
    def train():
        for _ in range(2):
            yield torch.ones(1000).sum()

    compared = compare(train, lambda: lambda: torch.ones(500))
    first, second = (variant.measurement for variant in compared.variants)
    assert first.losses == (1000.0, 1000.0)
    assert first.known_bytes >= 4000 and second.known_bytes >= 2000


def test_names():
    assert [v.name for v in compare(BEFORE, AFTER, AFTER).variants] == ["1", "2", "3"]
    assert [v.name for v in compare(BEFORE, AFTER, names=("x", "y")).variants] == ["x", "y"]
    assert [v.name for v in compare(BEFORE, names="a name").variants] == ["a name"]


@pytest.mark.parametrize(
    "runs, more, words",
    [
        ((), {}, "nothing to compare"),
        ((BEFORE, None), {}, "takes what measure.. returned, or a run, not NoneType"),
        (([BEFORE, AFTER],), {}, "not list"),
        ((BEFORE, made()), {}, "a run that allocated nothing on cpu cannot be compared"),
        ((BEFORE, AFTER), {"names": ["x"]}, "2 measurements need 2 names, not 1"),
        ((BEFORE, AFTER), {"names": "xy"}, "2 measurements need 2 names, not 1"),
        ((BEFORE, AFTER), {"names": ["x", "x"]}, "a name of its own"),
        ((BEFORE, AFTER), {"predicted": [1, 2, 3]}, "2 measurements need 2 predictions, not 3"),
        (
            (BEFORE, AFTER),
            {"predicted": 0},
            "prediction for 'after' has to be a positive whole number of bytes, not 0",
        ),
        ((BEFORE, AFTER), {"predicted": [-1, None]}, "prediction for 'before' .* not -1"),
        ((BEFORE, AFTER), {"predicted": 0.5 * MiB}, "prediction for 'after' .* not 524288.0"),
        ((BEFORE, AFTER), {"predicted": [True, None]}, "prediction for 'before' .* not True"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, more, words):
    with pytest.raises(ValueError, match=words):
        compare(*runs, **more)
