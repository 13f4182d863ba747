"""The tables with one row a notebook, or one a claim: what the course has and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memlab.course.notebook import Lesson
from memlab.course.tables import captioned, markdown
from memlab.course.words import difference, percent, times
from memlab.results import Claim, Record, Results
from memlab.units import format_bytes


def first_records(data: Results, lessons: Sequence[Lesson]) -> list[tuple[Lesson, Record]]:
    """Each notebook that recorded something, with its first record."""
    found = []
    for lesson in lessons:
        its_own = [record for record in data.records if record.notebook == lesson.name]
        found += [(lesson, record) for record in its_own[:1]]
    return found


def summary_table(data: Results, lessons: Sequence[Lesson], base: Path) -> str:
    """A results file in short: for each notebook its first record, from the baseline to the last
    variant.
    """
    table = []
    for lesson, record in first_records(data, lessons):
        before, after = record.variants[0], record.variants[-1]
        residuals = [v.residual for v in record.variants if v.residual is not None]
        row = {
            "notebook": lesson.link(base),
            "from → to": before.name,
            "peak before": format_bytes(before.peak_bytes),
            "peak after": "-",
            "× less": "-",
            "residual": percent(max(residuals, key=abs, default=None)),
            "× time": "-",
            "gradients": "-",
        }
        if after is not before:
            row |= {
                "from → to": f"{before.name} → {after.name}",
                "peak after": format_bytes(after.peak_bytes),
                "× less": times(after.times_less(before)),
                "× time": times(after.times_time(before)),
                "gradients": difference(after),
            }
        table.append(row)
    return captioned(data, table)


def claims_table(files: Sequence[Results], lessons: Sequence[Lesson], base: Path) -> str:
    """Every claim that the notebooks tested, with its verdict, as Markdown. Devices that disagree
    are named.
    """
    by_number: dict[int, list[Claim]] = {}
    for claim in (claim for data in files for claim in data.claims):
        by_number.setdefault(claim.number, []).append(claim)
    table = []
    for number, tested in sorted(by_number.items()):
        table.append(
            {
                "": str(number),
                "the article says": tested[0].says,
                "verdict": f"**{_verdict(tested)}**",
                "what was found": tested[0].found,
                "notebook": link_to(tested[0].notebook, lessons, base),
            }
        )
    return markdown(table)


def _verdict(tested: Sequence[Claim]) -> str:
    devices: dict[str, list[str]] = {}
    for claim in tested:
        devices.setdefault(claim.verdict, []).append(claim.environment.gpu or "CPU")
    if len(devices) == 1:
        return tested[0].verdict
    return "; ".join(
        f"{', '.join(dict.fromkeys(names))}: {verdict}" for verdict, names in devices.items()
    )


def map_table(
    lessons: Sequence[Lesson],
    base: Path,
    colab: str | None = None,
    in_depth: Sequence[Lesson] = (),
) -> str:
    """The map of the notebooks as Markdown, from their titles and their metadata.

    Args:
        lessons: what people begin with; what one needs (`Lesson.about`) is a notebook, by its
            number or its name, or words. A notebook in depth stands for a lesson that is not there.
        base: the folder of the document: links are relative to it.
        colab: the address at which Google Colab opens what lies in `base`; with it each notebook
            has a link to it there.
        in_depth: the notebooks behind the lessons; a lesson's row has a link to its own.
    """
    by_name = {each.name: each for each in in_depth}
    shown = by_name | {each.name: each for each in lessons}
    lessons = [shown[name] for name in sorted(shown)] if in_depth else lessons
    table = []
    for lesson in lessons:
        needs = [link_to(str(need), lessons, base) for need in lesson.about.get("needs", [])]
        row = {
            "": lesson.number,
            "notebook": lesson.link(base),
            "column": lesson.columns or "-",
            "minutes": str(lesson.about.get("minutes") or "-"),
            "read first": ", ".join(needs) or "-",
        }
        if in_depth:
            behind = by_name.get(lesson.name)
            is_short = behind is not None and behind is not lesson
            row["in depth"] = behind.link(base, lesson.number) if is_short else "-"
        if colab:
            row["open in"] = lesson.link(Path(base), "Colab").replace("](", f"]({colab}/")
        table.append(row)
    return markdown(table)


def link_to(need: str, lessons: Sequence[Lesson], base: Path) -> str:
    """A link to the notebook of this name, number or topic, else the words themselves."""
    for lesson in lessons:
        if need in (lesson.name, lesson.number, lesson.topic):
            return lesson.link(base, lesson.number)
    return need
