"""The zoo's table says how far predictions are off, and why."""

from memlab.course.zoo import is_miss, summary, zoo_table
from memlab.results.zoo import Zoo, ZooRow


def row(model="A", **changes):
    return ZooRow(model=model, **{"way": "AdamW", "known_bytes": 5000} | changes)


ROWS = [
    row(predicted_bytes=5000),
    row(way="SGD", predicted_bytes=4990, residuals={"activations": -20, "kept": 10}),
    row("B", predicted_bytes=6000, residuals={"temporaries": 1000}, reason="a workspace"),
    row("C", refusal="ValueError: no such operator"),
]
ZOO = Zoo(torch="2.13.0", transformers="5.23.0", models=3, rows=ROWS)


def test_a_row_misses_if_it_is_refused_or_more_apart_than_scalars_are():
    assert [is_miss(each) for each in ROWS] == [False, False, True, True]
    assert [each.residual for each in ROWS] == [0, 20, 1000, None]


def test_the_summary_has_median_p95_and_worst():
    said = summary(ZOO)
    assert "4 rows of 3 models" in said and "**median 20, p95 1,000, worst 1,000**" in said
    assert "Within 256 bytes: 2; refused with an error: 1." in said


def test_each_model_and_each_miss_with_its_reason_is_in_the_table():
    table = zoo_table(ZOO)
    assert "| A | 2 | 20 | 5,000 | SGD |" in table
    assert "| B | AdamW | +1,000 | 5,000 | a workspace |" in table
    assert "| C | AdamW | refused | 5,000 | ValueError: no such operator |" in table
