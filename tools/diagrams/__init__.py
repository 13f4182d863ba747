"""The lessons' diagrams: `lesson_03.draw()` is that of the lesson whose name begins with 03."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from memlab.course.notebook import lessons
from tools.diagrams.drawing import Diagram

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks" / "diagrams"


def lessons_drawn() -> list[str]:
    """The names of the lessons that have a diagram."""
    here = Path(__file__).parent
    names = [path.stem for path in lessons(ROOT)]
    return [name for name in names if (here / f"lesson_{name.partition('_')[0]}.py").exists()]


def diagram(lesson: str) -> Diagram:
    """Draw a lesson's diagram.

    Args:
        lesson: its name, such as "03_gradient_checkpointing".
    """
    return import_module(f"tools.diagrams.lesson_{lesson.partition('_')[0]}").draw()
