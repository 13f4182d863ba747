"""What the lessons' diagrams are drawn with.

Each is drawn, not measured: it shows the idea. All have one form, and the colours of the course's
figures, so that a column has the same colour everywhere. A diagram has a ground of its own, light
or dark as the reader's browser asks, so that it can be read on any page.
"""

from __future__ import annotations

from html import escape

from memlab.figures.style import PALETTE

STYLE = """
  .ground { fill: #ffffff; stroke: #d0d0d0 }
  text { fill: #202020; font: 15px sans-serif }
  .small { font-size: 13px; fill: #505050 }
  .on { fill: #ffffff }
  .dark { font-size: 13px; fill: #202020 }
  .axis { stroke: #606060; fill: none; stroke-width: 1.5 }
  .mark { stroke: #606060; stroke-dasharray: 4 4; fill: none }
  .block { stroke: #ffffff; stroke-width: 1 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #1c1c1c; stroke: #404040 }
    text { fill: #ececec }
    .small { fill: #b8b8b8 }
    .on { fill: #ffffff }
    .dark { fill: #202020 }
    .axis, .mark { stroke: #a0a0a0 }
    .block { stroke: #1c1c1c }
  }
"""


class Diagram:
    """An SVG that grows: rectangles, areas, lines and texts, in pixels from the upper left."""

    def __init__(self, width: int, height: int, words: str) -> None:
        self.width = width
        self.height = height
        self.words = words
        self.parts: list[str] = []

    def rectangle(self, x: float, y: float, width: float, height: float, column: str) -> None:
        """A box in a column's colour."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect class="block" {place} fill="{PALETTE[column]}"/>')

    def area(self, points: list[tuple[float, float]], column: str) -> None:
        """A polygon in a column's colour."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polygon class="block" points="{path}" fill="{PALETTE[column]}"/>')

    def line(self, x: float, y: float, to_x: float, to_y: float, kind: str = "axis") -> None:
        """A line: an "axis" or a dashed "mark"."""
        self.parts.append(f'<path class="{kind}" d="M{x:g} {y:g}L{to_x:g} {to_y:g}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Words; `kind` is "small", or "on" and "dark" for those on a dark and a light colour."""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.parts.append(f'<text class="{kind}" {place}>{escape(words)}</text>')

    def __str__(self) -> str:
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
        ground = f'<rect class="ground" x="1" y="1" width="{self.width - 2}" rx="8"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
                f"<title>{escape(self.words)}</title>",
                f"<style>{STYLE}</style>",
                f'{ground} height="{self.height - 2}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def bytes_of_a_parameter(
    drawn: Diagram, y: float, name: str, parts: list[tuple[str, int, str]], total: str
) -> None:
    """A row of boxes: what one parameter has, a byte as wide as every other.

    Args:
        drawn: what it is drawn into.
        y: the boxes' upper edge.
        name: whose row it is.
        parts: of each box its column, its bytes, and its words.
        total: the words after the last box.
    """
    x, byte, height = 190, 34, 50
    drawn.text(x - 16, y + 31, name, "", "end")
    for column, count, words in parts:
        width = byte * count
        drawn.rectangle(x, y, width, height, column)
        # The light colour of the gradients needs dark words.
        kind = "dark" if column == "gradients" else "on"
        drawn.text(x + width / 2, y + 31, words, kind, "middle")
        x += width
    drawn.text(x + 14, y + 31, total)
