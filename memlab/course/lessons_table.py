"""What the lessons' techniques did, in one table for README.md and one for the cheat sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memlab.course.cards import measured_here, on_gpu
from memlab.course.notebook import Lesson
from memlab.course.overviews import first_records
from memlab.course.tables import markdown
from memlab.course.words import times
from memlab.results import Record, Results, Variant
from memlab.results.lessons import load_cards
from memlab.units import format_bytes

#: GPT-2 on a GPU, and the rungs of the capstone's ladder that its three factors compare.
LARGE = "nvidia-h100-80gb-hbm3-large.json"
NAIVE = "naive"
CAREFUL = "BF16 autocast"
PIECES = "embedding far, 8 at a time"
SMALLEST = "embedding far"


def lessons_table(lessons: Sequence[Lesson], root: Path, base: Path) -> str:
    """The core lessons: what is measured here, on a GPU, and predicted for a large model.

    Args:
        lessons: all lessons; electives get no row.
        root: the checkout.
        base: the folder of the document: links are relative to it.
    """
    cards = load_cards(root)
    rows = []
    for lesson in lessons:
        if not lesson.number.isdigit():
            continue
        row = {"lesson": lesson.link(base), "shrinks": lesson.columns}
        here = measured_here(lesson.name, root)
        row["measured here"] = _peaks(here.variants[0], here.variants[-1]) if here else "-"
        row["measured on an H100"] = row["seconds a step there"] = "-"
        if about := lesson.about.get("card", {}).get("gpu"):
            _, before, after = on_gpu(about, root)
            row["measured on an H100"] = _peaks(before, after)
            row["seconds a step there"] = _seconds(before, after)
        card = cards.get(lesson.name)
        row["a large model, predicted"] = _peaks(card.before, card.after) if card else "-"
        rows.append(row)
    return markdown(rows)


def _seconds(before: Variant, after: Variant) -> str:
    if not (before.seconds and after.seconds):
        return "-"
    both = f"{before.seconds.median:.2g} → {after.seconds.median:.2g}"
    return both if _apart(before, after) else f"{both}, within the spread"


def _apart(before: Variant, after: Variant) -> bool:
    """Whether the two were timed, and lie further apart than the repeats of each."""
    first, second = before.seconds, after.seconds
    if first is None or second is None:
        return False
    return abs(first.median - second.median) > first.spread + second.spread


def _peaks(before: Variant, after: Variant) -> str:
    return f"{format_bytes(before.peak_bytes)} → {format_bytes(after.peak_bytes)}"


def cheat_sheet(
    files: Sequence[Results],
    in_depth: Sequence[Lesson],
    short: Sequence[Lesson],
    root: Path,
    base: Path,
) -> str:
    """Every technique in one row: what it shrinks, by how much on a GPU, and when to leave it.

    How long a step takes is a GPU's, or not said.

    Args:
        files: the records; those of a GPU are used.
        in_depth: the notebooks whose metadata have the words (`exact`, `leave`).
        short: the lessons, which are linked where they stand.
        root: the checkout.
        base: the folder of the document: links are relative to it.
    """
    lessons = {lesson.name: lesson for lesson in short}
    on_gpus = [data for data in files if data.environment.device == "cuda"]
    records: dict[str, Record] = {}
    for data in on_gpus:
        for lesson, record in first_records(data, in_depth):
            records.setdefault(lesson.name, record)
    rows = []
    for lesson in in_depth:
        if not lesson.about.get("leave"):
            continue
        shown = lessons.get(lesson.name, lesson)
        less = time = "-"
        if about := shown.about.get("card", {}).get("gpu"):
            _, before, after = on_gpu(about, root)
            less = times(after.times_less(before))
            time = times(after.times_time(before)) if _apart(before, after) else "-"
        elif record := records.get(lesson.name):
            less = times(record.variants[-1].times_less(record.variants[0]))
        rows.append(
            {
                "technique": shown.link(base, shown.title.partition("·")[2].strip()),
                "shrinks": shown.columns,
                "× less": less,
                "× time": time,
                "exact?": lesson.about.get("exact", "-"),
                "leave it when": lesson.about["leave"],
            }
        )
    return markdown(rows)


def three_factors(root: Path) -> str:
    """How much less the whole recipe needs on a GPU: against whom, by which count, in what time;
    empty where no GPU has run it.
    """
    if not (root / "results" / LARGE).is_file():
        return ""
    about = {"file": LARGE, "notebook": "11_capstone"}
    record, naive, pieces = on_gpu(about | {"before": NAIVE, "after": PIECES}, root)
    _, careful, smallest = on_gpu(about | {"before": CAREFUL, "after": SMALLEST}, root)
    driver = naive.device_bytes / smallest.device_bytes
    return (
        f"All together on an {record.environment.gpu}, GPT-2 124M, 8 × 1,024 tokens:"
        f" **{times(pieces.times_less(naive), 0)}× less** than the naive loop in"
        f" {times(pieces.times_time(naive))} of its time. Against a careful loop (SDPA, BF16"
        f" autocast) it is {careful.peak_bytes / pieces.peak_bytes:.0f}× less at"
        f" {pieces.seconds.median / careful.seconds.median:.1f} times the time."
        f" By the driver's count, which includes CUDA's own memory, the smallest recipe is"
        f" {driver:.0f}× less than the naive loop."
    )
