"""The table of the predictions of the H100's records."""

from pathlib import Path

from memlab import results
from memlab.course import documents
from memlab.course.predicted import in_one_line, in_words, predictions_table

ROOT = Path(__file__).resolve().parents[2]
FOUND = results.load_predictions(ROOT)


def test_the_table_in_the_results_is_of_these_predictions():
    readme = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    begin, end = (f"<!-- memlab:predictions:{edge} -->" for edge in ("begin", "end"))
    assert readme.split(begin)[1].split(end)[0].strip() == predictions_table(FOUND)
    assert "predictions" in documents.DOCUMENTS["results/README.md"]
    assert in_words(FOUND.allocated) in readme and in_words(FOUND.reserved) in readme


def test_readme_says_it_in_one_line():
    line = in_one_line(FOUND)
    assert line in (ROOT / "README.md").read_text(encoding="utf-8")
    equal = [row for row in FOUND.rows if row.allocated.predicted == row.allocated.measured]
    assert f"{len(FOUND.rows)} runs" in line and f"equal in {len(equal)}" in line
    assert in_one_line(None) == "Nothing is predicted yet."
