"""Which span holds a moment, which ones begin in another, which ones lie in no other."""

import ast
from pathlib import Path

import memlab.ledger
from memlab.ledger import Span, Spans

OUTER = Span(0, 100, "module", "outer")
FIRST = Span(10, 40, "operator", "first")
INNER = Span(20, 30, "operator", "inner")
SECOND = Span(40, 60, "operator", "second")
ALONE = Span(120, 130, "module", "alone")
ALL = Spans([INNER, ALONE, SECOND, OUTER, FIRST])


def test_nothing_here_imports_torch():
    for path in Path(memlab.ledger.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        rooms = {name for name in names if name.split(".")[0] in ("torch", "memlab")}
        assert all(name.startswith("memlab.ledger.") for name in rooms), path


def test_the_order_is_that_of_time_the_longer_one_first():
    assert list(ALL) == [OUTER, FIRST, INNER, SECOND, ALONE]
    same = [Span(0, 5, "step", "short"), Span(0, 9, "step", "long")]
    assert [span.name for span in Spans(same)] == ["long", "short"]
    assert (len(ALL), ALL[1]) == (5, FIRST)


def test_at_gives_the_innermost():
    moments = {
        -1: None,
        0: OUTER,
        10: FIRST,
        19: FIRST,
        20: INNER,
        29: INNER,
        30: FIRST,
        40: SECOND,  # an end is no part of a span
        60: OUTER,
        99: OUTER,
        100: None,
        120: ALONE,
        130: None,
    }
    assert {moment: ALL.at(moment) for moment in moments} == moments
    assert Spans().at(0) is None


def test_at_with_spans_that_overlap_or_take_no_time():
    """Threads do not lie in each other; a clock may be coarse."""
    left, right = Span(0, 10, "operator", "left"), Span(5, 15, "operator", "right")
    both = Spans([left, right])
    assert [both.at(moment) for moment in (4, 5, 12, 15)] == [left, right, right, None]
    moment = Span(3, 3, "operator")
    assert Spans([moment]).at(3) is None and Spans([moment, left]).at(3) == left


def test_inside_are_those_that_begin_there():
    assert ALL.inside(FIRST) == [FIRST, INNER]
    assert ALL.inside(Span(20, 120, "step")) == [INNER, SECOND]
    assert Spans().inside(OUTER) == []


def test_outermost_lie_in_no_other():
    assert list(ALL.outermost()) == [OUTER, ALONE]
    assert list(Spans([FIRST, INNER, SECOND]).outermost()) == [FIRST, SECOND]


def test_of_some_kinds():
    assert list(ALL.of("module")) == [OUTER, ALONE]
    assert len(ALL.of("module", "operator")) == 5 and len(ALL.of("step")) == 0


def test_begun_counts():
    assert [ALL.begun(moment) for moment in (-1, 0, 19, 20, 500)] == [0, 1, 2, 3, 5]
