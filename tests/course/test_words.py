"""Numbers of a record in words."""

from memlab.course.words import at_most, caption, difference, percent, times, with_spread
from tests.records import ENVIRONMENT, GPU, record, results_file, timed, variant


def test_no_residual_is_less_than_nothing():
    said = [percent(value) for value in (-0.00001, 0.0, -0.0001, None)]
    assert said == ["+0.00 %", "+0.00 %", "-0.01 %", "-"]


def test_a_difference_is_within_what_is_said_of_it():
    said = [at_most(value) for value in (0.14, 0.1, 9.1e-7, 3e-7, 1)]
    assert said == ["2e-01", "1e-01", "1e-06", "3e-07", "1e+00"]
    variants = [variant(max_gradient_difference=value) for value in (None, 0.0, 2e-7)]
    assert list(map(difference, variants)) == ["-", "equal", "within 2e-07"]


def test_factors_and_seconds():
    assert (times(1.2345), times(1.2345, digits=1), times(None)) == ("1.23", "1.2", "-")
    assert (with_spread(timed(0.5, 0.0123)), with_spread(None)) == ("0.5 (0.012)", "-")


def test_the_caption_says_where_and_when():
    older = GPU.model_copy(update={"date": "2025-12-01", "torch": "2.11.0"})
    data = results_file(record(environment=older), record(scale="large"), environment=GPU)
    assert caption(data) == (
        "**NVIDIA H200, 140.00 GiB** (torch 2.11.0, 2.13.0; scale cpu, large; measured 2025-12-01"
        " to 2026-01-31)"
    )
    alone = results_file(environment=ENVIRONMENT.model_copy(update={"threads": 1}))
    said = "**CPU, 1 thread** (torch 2.13.0; scale -; measured 2026-01-31)"
    assert caption(alone) == said
