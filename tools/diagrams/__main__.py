"""Draw the lessons' diagrams: `python -m tools.diagrams` writes notebooks/diagrams/*.svg."""

from __future__ import annotations

from tools.diagrams import FOLDER, diagram, lessons_drawn

for name in lessons_drawn():
    (FOLDER / f"{name}.svg").write_text(str(diagram(name)), encoding="utf-8")
