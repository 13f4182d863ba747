"""One table, in the three forms in which people meet it."""

from memlab.show import Table

ROWS = [
    {"run": "naive", "peak": "15.05 GiB", "note": ""},
    {"run": "a | b", "peak": "1 B", "note": "<1 %"},
]
TABLE = Table(ROWS, numbers={"peak"})


def test_as_text():
    assert TABLE.to_text().splitlines() == [
        "run         peak  note",
        "naive  15.05 GiB",
        "a | b        1 B  <1 %",
    ]
    assert TABLE.to_text(headings=False).splitlines()[0] == "naive  15.05 GiB"


def test_as_markdown():
    assert TABLE.to_markdown().splitlines() == [
        "| run | peak | note |",
        "| --- | ---: | --- |",
        "| naive | 15.05 GiB |  |",
        "| a \\| b | 1 B | <1 % |",
    ]


def test_as_html():
    page = TABLE.to_html()
    assert "<th style='text-align:right'>peak</th>" in page
    assert "<td style='text-align:left'>&lt;1 %</td>" in page
    assert page.count("<tr>") == 3


def test_without_rows():
    empty = Table([])
    assert empty.to_text() == empty.to_markdown() == empty.to_html() == ""
