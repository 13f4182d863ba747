"""Draw the lessons' diagrams: `python -m tools.diagrams` writes notebooks/diagrams/*.svg.

Each is drawn, not measured: it shows the idea. All have one form, and the colours of the course's
figures, so that a column has the same colour everywhere. A diagram has a ground of its own, light
or dark as the reader's browser asks, so that it can be read on any page.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from memlab.figures.style import PALETTE

FOLDER = Path(__file__).resolve().parents[1] / "notebooks" / "diagrams"

STYLE = """
  .ground { fill: #ffffff; stroke: #d0d0d0 }
  text { fill: #202020; font: 15px sans-serif }
  .small { font-size: 13px; fill: #505050 }
  .on { fill: #ffffff }
  .axis { stroke: #606060; fill: none; stroke-width: 1.5 }
  .mark { stroke: #606060; stroke-dasharray: 4 4; fill: none }
  .block { stroke: #ffffff; stroke-width: 1 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #1c1c1c; stroke: #404040 }
    text { fill: #ececec }
    .small { fill: #b8b8b8 }
    .on { fill: #ffffff }
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
        """Words; `kind` is "small", or "on" for those on a coloured ground."""
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


def checkpointing() -> Diagram:
    """Which activations are kept: all of six blocks, or the inputs and one block at a time."""
    drawn = Diagram(
        860,
        560,
        "Without checkpoints all blocks wait for backward. With checkpoints their inputs wait, and"
        " one block at a time is whole again.",
    )
    blocks, left, step = 6, 150, 46
    middle = left + blocks * step

    def frame(base: float, title: str) -> None:
        drawn.text(24, base - 190, title)
        drawn.line(left, base, middle + blocks * step + 20, base)
        drawn.line(left, base, left, base - 180)
        drawn.line(middle, base + 22, middle, base - 180, "mark")
        drawn.text(left + blocks * step / 2, base + 20, "forward", "small", "middle")
        drawn.text(middle + blocks * step / 2, base + 20, "backward", "small", "middle")
        drawn.text(left - 12, base - 90, "activations", "small", "end")

    # All that a block computes waits from its forward to its backward.
    base, tall = 240, 26
    frame(base, "Without checkpoints")
    for number in range(blocks):
        x = left + number * step
        length = 2 * (blocks - number) * step
        y = base - (number + 1) * tall
        drawn.rectangle(x, y, length, tall, "activations")
        words = f"block {number + 1}" + (": all it computed" if number == 0 else "")
        drawn.text(x + 10, y + 18, words, "on")

    # A sixteenth of it waits; the whole is there while its block is differentiated.
    base, thin = 510, 4
    frame(base, "With a checkpoint for each block")
    for number in range(blocks):
        x = left + number * step
        drawn.rectangle(
            x, base - (number + 1) * thin, 2 * (blocks - number) * step, thin, "activations"
        )
    for number in range(blocks):
        x = middle + (blocks - 1 - number) * step
        y = base - (number + 1) * thin - tall
        drawn.rectangle(x, y, step, tall, "activations")
        drawn.text(x + step / 2, y + 18, f"{number + 1}", "on", "middle")
    drawn.text(left + 10, base - 70, "the inputs of the blocks stay", "small")
    drawn.text(middle + 10, base - 70, "one block at a time is computed again", "small")
    return drawn


def landscape() -> Diagram:
    """A training step's memory: what is constant, what grows in forward, what in backward."""
    drawn = Diagram(
        860,
        450,
        "A training step's memory. Weights and optimizer state are always there. Activations grow"
        " in forward and go in backward. Gradients grow in backward and go after the step.",
    )
    left, forward_end, backward_end, right = 110, 330, 620, 720
    base = 380
    layers = {"parameters": 44, "optimizer_state": 88}
    top = base
    for column, height in layers.items():
        drawn.rectangle(left, top - height, right - left, height, column)
        top -= height
    drawn.text(left + 14, base - 17, "weights: 4 bytes a parameter", "on")
    drawn.text(left + 14, base - 82, "optimizer state: 8 bytes a parameter", "on")

    # Gradients grow while backward takes the activations down.
    whole = 44
    drawn.area(
        [(forward_end, top), (backward_end, top - whole), (right, top - whole), (right, top)],
        "gradients",
    )
    peak = 170
    drawn.area(
        [(left, top), (forward_end, top - peak), (backward_end, top - whole), (forward_end, top)],
        "activations",
    )
    # The logits and their gradients stand on the peak for a moment.
    drawn.area(
        [
            (forward_end - 18, top - peak + 14),
            (forward_end, top - peak - 42),
            (forward_end + 18, top - peak + 8),
            (forward_end, top - peak),
        ],
        "temporaries",
    )
    drawn.text(forward_end - 12, top - 46, "activations", "on", "end")
    drawn.text(right + 10, top - 28, "gradients:")
    drawn.text(right + 10, top - 8, "4 bytes a", "small")
    drawn.text(right + 10, top + 8, "parameter", "small")
    drawn.text(forward_end + 26, top - peak - 30, "temporaries: for a moment, as at the loss")
    drawn.text(forward_end + 26, top - peak - 10, "the peak decides whether it fits", "small")

    drawn.line(left, base, right + 20, base)
    drawn.line(left, base, left, 40)
    drawn.line(forward_end, base + 26, forward_end, 40, "mark")
    drawn.line(backward_end, base + 26, backward_end, top - whole - 60, "mark")
    middles = {
        "forward": (left + forward_end) / 2,
        "backward": (forward_end + backward_end) / 2,
        "optimizer": (backward_end + right) / 2,
    }
    for words, x in middles.items():
        drawn.text(x, base + 22, words, "small", "middle")
    drawn.text(left - 12, 60, "bytes", "small", "end")
    drawn.text(right + 20, base + 22, "time", "small")
    return drawn


def precisions() -> Diagram:
    """What has 32 bits during a step, and what has 16: a bar is as high as its numbers are wide."""
    drawn = Diagram(
        860,
        500,
        "One training step under autocast. Weights, optimizer state, gradients and the inputs of"
        " the norms have 32 bits. The other activations and the copies of the weights have 16.",
    )
    left, forward_end, backward_end, right = 110, 350, 620, 740
    whole, half, gap = 44, 22, 10
    base = 456
    for end in (forward_end, backward_end):
        drawn.line(end, base + 26, end, 40, "mark")

    def until_backward(y: float, height: float, words: str) -> None:
        """What forward keeps, and backward gives back, the last block first."""
        corners = [(backward_end, y), (forward_end, y + height), (left, y + height)]
        drawn.area([(left, y), *corners], "activations")
        drawn.text(left + 14, y + height / 2 + 5, words, "on")

    drawn.text(24, 34, "32 bits: a high bar")
    y = 48
    for column, words in {
        "parameters": "weights: the optimizer changes these",
        "optimizer_state": "optimizer state",
    }.items():
        drawn.rectangle(left, y, right - left, whole, column)
        drawn.text(left + 14, y + 27, words, "on")
        y += whole + gap
    grown = [(forward_end, y + whole), (backward_end, y), (right, y), (right, y + whole)]
    drawn.area(grown, "gradients")
    drawn.text(forward_end - 14, y + 27, "gradients of the weights", "", "end")
    y += whole + gap
    until_backward(y, whole, "inputs of the norms")

    y += whole + 56
    drawn.text(24, y - 14, "16 bits: a low bar")
    drawn.text(backward_end + 14, y + 50, "nothing of 16 bits", "small")
    drawn.text(backward_end + 14, y + 68, "outlives backward", "small")
    for words in (
        "inputs of matrix products",
        "queries, keys, values",
        "before and after the GELU",
        "copies of the weights",
    ):
        until_backward(y, half, words)
        y += half + 8

    drawn.line(left, base, right + 20, base)
    middles = {
        "forward": (left + forward_end) / 2,
        "backward": (forward_end + backward_end) / 2,
        "optimizer": (backward_end + right) / 2,
    }
    for words, x in middles.items():
        drawn.text(x, base + 22, words, "small", "middle")
    drawn.text(right + 28, base + 22, "time", "small")
    return drawn


DIAGRAMS = {
    "00_measuring_memory": landscape,
    "01_mixed_precision": precisions,
    "03_gradient_checkpointing": checkpointing,
}


def main(folder: Path = FOLDER) -> None:
    """Write all diagrams."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DIAGRAMS.items():
        (folder / f"{name}.svg").write_text(f"{draw()}", encoding="utf-8")


if __name__ == "__main__":
    main()
