"""What of a notebook leads to its records."""

import ast

from memlab.course.slices import statements_for_records


def notebook(*cells):
    return {"cells": [{"cell_type": "code", "source": [cell]} for cell in cells]}


def test_only_what_leads_to_a_record_is_run_again():
    statements = statements_for_records(
        notebook(
            "%pip install memlab\nfrom memlab import compare, measure, results\nimport math",
            "def build(size):\n    return lambda: factor * size\n",
            "unused = measure(build(1))\nfactor = 2\nruns = {}",
            "for size in (1, 2):\n    runs[size] = measure(build(size))\n    print(runs[size])",
            "gap = math.pi\nassert runs",
            "results.record(compare(*runs.values(), predicted=[gap]), loss={'a': gap})",
        )
    )
    assert [ast.unparse(each) for each in statements] == [
        "from memlab import compare, measure, results",
        "def build(size):\n    return lambda: factor * size",
        "factor = 2",
        "runs = {}",
        "for size in (1, 2):\n    runs[size] = measure(build(size))",
        "results.record(compare(*runs.values()))",
    ]


def test_the_value_before_is_the_one_that_is_used():
    statements = statements_for_records(
        notebook("a = 1", "a = 2", "b = [a]", "b.append(3)", "a = 4", "results.record(b)", "b = 5")
    )
    assert [ast.unparse(each) for each in statements] == [
        "a = 2",
        "b = [a]",
        "b.append(3)",
        "results.record(b)",
    ]
