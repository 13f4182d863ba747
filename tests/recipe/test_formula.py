import pytest

from memlab import measure, recipe

LINES = tuple(recipe.LADDER)


def combinations():
    """The rungs; and, all on the device, the exact lines with one approximate line."""
    near = [name for name in LINES if not name.endswith("far") and name != "lean start"]
    with_one = [
        tuple(name for name in near if name not in recipe.APPROXIMATE or name == approximate)
        for approximate in recipe.APPROXIMATE
    ]
    return [*recipe.RUNGS.values(), *with_one]


@pytest.mark.parametrize(
    "lines", combinations(), ids=lambda lines: f"{len(lines)} to {lines[-1]}" if lines else "naive"
)
def test_the_peak_is_what_the_formula_says(lines):
    """On the notebook's own model. What an operator takes for itself is left out: it depends on the
    processor.
    """
    run = measure(recipe.training(*lines))
    _, expected = recipe.predict(lines)
    assert abs(run.known_bytes - expected) < 0.05 * expected
