"""The tables with one row a notebook, or one a claim."""

from pathlib import Path

import pytest

from memlab.course import overviews
from memlab.course.notebook import Lesson
from tests.records import GPU, claim, pair, record, results_file, timed

ROOT = Path("/checkout")
CAPTION = "**CPU, 2 threads** (torch 2.13.0; scale cpu; measured 2026-01-31)"


def lesson(name, title=None, **about):
    return Lesson(ROOT / "notebooks" / f"{name}.ipynb", title or name, about)


# The summary --------------------------------------------------------------------------------------


def test_the_summary_has_the_first_record_of_each_notebook():
    lessons = [lesson(name, f"About {name}") for name in ("00_none", "03_x", "04_y")]
    data = results_file(
        record(variants=pair(timed(0.75), difference=0.0)),
        record(technique="second"),
        record("04_y", "y", variants=pair(difference=2e-7)),
    )
    assert overviews.summary_table(data, lessons, ROOT).splitlines() == [
        CAPTION,
        "",
        "| notebook | from → to | peak before | peak after | × less | residual | × time |"
        " gradients |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        "| [About 03_x](notebooks/03_x.ipynb) | before → after | 4.00 MiB | 2.00 MiB | 2.00 |"
        " -0.99 % | 1.50 | equal |",
        "| [About 04_y](notebooks/04_y.ipynb) | before → after | 4.00 MiB | 2.00 MiB | 2.00 |"
        " -0.99 % | - | within 2e-07 |",
    ]


def test_the_summary_of_a_run_that_stands_alone():
    data = results_file(record(variants=pair()[:1]))
    table = overviews.summary_table(data, [lesson("03_x")], ROOT)
    row = "| [03_x](notebooks/03_x.ipynb) | before | 4.00 MiB | - | - | +0.00 % | - | - |"
    assert table.splitlines()[-1] == row
    assert overviews.summary_table(results_file(), [], ROOT).startswith("**CPU, 2 threads**")


@pytest.mark.parametrize(("spread", "shown"), [(0.37, "| 1.50 |"), (0.38, "| - |")])
def test_no_seconds_of_a_busy_machine_are_compared(spread, shown):
    data = results_file(record(variants=pair(timed(0.75, spread))))
    lessons = [lesson("03_x", column="batch", leave="it is small")]
    assert shown in overviews.summary_table(data, lessons, ROOT)


# Claims -------------------------------------------------------------------------------------------


def test_the_claims_and_their_verdicts():
    lessons, large = [lesson("03_x")], "holds when it is large"
    link = "[03](notebooks/03_x.ipynb)"
    cpu = results_file(claim(10, "does not hold"), claim(3, large))
    same = results_file(claim(3, large), environment=GPU)
    assert overviews.claims_table([cpu, same], lessons, ROOT).splitlines() == [
        "|  | the article says | verdict | what was found | notebook |",
        "| --- | --- | --- | --- | --- |",
        f"| 3 | less memory | **{large}** | It is so. | {link} |",
        f"| 10 | less memory | **does not hold** | It is so. | {link} |",
    ]
    other = results_file(claim(3, "does not hold"), environment=GPU)
    table = overviews.claims_table([cpu, other], lessons, ROOT)
    assert f"**CPU: {large}; NVIDIA H200: does not hold**" in table
    assert overviews.claims_table([results_file()], lessons, ROOT) == ""


# The map ------------------------------------------------------------------------------------------

LESSONS = [
    lesson("00_measuring", "Measuring | memory", minutes=20),
    lesson("03_x", "The x technique", minutes=15, needs=["00", "calculus"], column="batch"),
    lesson("electives/e2_y", "e2_y", needs=["x"], column=["activations", "batch"]),
]


def test_the_map_of_the_notebooks():
    assert overviews.map_table(LESSONS, ROOT).splitlines()[2:] == [
        "| 00 | [Measuring \\| memory](notebooks/00_measuring.ipynb) | - | 20 | - |",
        "| 03 | [The x technique](notebooks/03_x.ipynb) | batch | 15 |"
        " [00](notebooks/00_measuring.ipynb), calculus |",
        "| e2 | [e2_y](notebooks/electives/e2_y.ipynb) | activations, batch | - |"
        " [03](notebooks/03_x.ipynb) |",
    ]
    inside = overviews.map_table(LESSONS, ROOT / "notebooks" / "electives")
    assert "[The x technique](../03_x.ipynb)" in inside


def test_a_lesson_stands_before_the_notebook_behind_it():
    behind = [
        lesson("in_depth/03_x", "03 · Long", minutes=90),
        lesson("in_depth/04_y", "04 · Long"),
    ]
    table = overviews.map_table([lesson("03_x", "03 · Short", minutes=15)], ROOT, None, behind)
    assert table.splitlines()[2:] == [
        "| 03 | [03 · Short](notebooks/03_x.ipynb) | - | 15 | - |"
        " [03](notebooks/in_depth/03_x.ipynb) |",
        "| 04 | [04 · Long](notebooks/in_depth/04_y.ipynb) | - | - | - | - |",
    ]


def test_the_map_leads_to_colab_where_there_is_an_address():
    table = overviews.map_table(LESSONS, ROOT, "https://colab/blob/main")
    assert "| [Colab](https://colab/blob/main/notebooks/03_x.ipynb) |" in table
