"""What it costs to watch a long training, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from memlab.course.words import times
from memlab.results.watched import WatchedRun
from memlab.show import Table
from memlab.units import format_bytes

NOTHING = "No long run was watched yet."

_NUMBERS = {
    "steps",
    "ms a step",
    "watched",
    "× time",
    "seconds to begin",
    "seconds to end",
    "more resident",
    "recorded in full",
}


def watched_table(runs: Sequence[WatchedRun]) -> str:
    """The runs, a row each, below a line that says whose times they are."""
    if not runs:
        return NOTHING
    rows = [
        {
            "loop": f"{run.layers} layers of {run.width}, batch {run.batch}",
            "steps": f"{run.steps:,}",
            "ms a step": f"{1000 * run.seconds_a_step:.2f}",
            "watched": f"{1000 * run.watched_seconds_a_step:.2f}",
            "× time": times(run.watched_seconds_a_step / run.seconds_a_step),
            "seconds to begin": f"{run.enter_seconds:.2f}",
            "seconds to end": f"{run.exit_seconds:.2f}",
            "more resident": format_bytes(run.resident_bytes),
            "recorded in full": str(run.recorded),
            "measured": f"{run.environment.date}, {run.environment.gpu or 'CPU'}",
        }
        for run in runs
    ]
    words = (
        "The times are those of the machine that measured them, with all else that it did then."
        " What a step costs more is paid by those recorded in full: the factor falls as steps grow."
    )
    return f"{words}\n\n{Table(rows, _NUMBERS).to_markdown()}"
