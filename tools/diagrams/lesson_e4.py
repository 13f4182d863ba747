"""An MLP's wide tensors: for all tokens at once, or for a chunk of them."""

from tools.diagrams.drawing import Diagram

WIDE, NARROW = 4 * 36, 36  # four times the width


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        900,
        500,
        "All tokens at once: two wide tensors of all tokens wait for backward. In four chunks: the"
        " wide tensors of one chunk at a time, and only the narrow input of all tokens waits.",
    )
    _draw_at_once(drawn, 30)
    _draw_in_chunks(drawn, 265)
    return drawn


def _draw_at_once(drawn: Diagram, top: float) -> None:
    drawn.text(24, top + 4, "All tokens at once: the wide tensors wait for backward")
    middle = top + 110
    _draw_ends(drawn, middle)
    for x, words in ((290, "before the GELU"), (590, "after the GELU")):
        drawn.rectangle(x, middle - WIDE / 2, 200, WIDE, "activations")
        drawn.text(x + 100, middle - 4, words, "on", "middle")
        drawn.text(x + 100, middle + 18, "all tokens, 4 × as wide", "on", "middle")


def _draw_in_chunks(drawn: Diagram, top: float) -> None:
    drawn.text(24, top + 4, "In four chunks: only the input waits, the chunk at work is wide")
    middle = top + 110
    _draw_ends(drawn, middle)
    for x in (290, 590):
        for part in range(4):
            left = x + part * 50
            if part == 1:
                drawn.rectangle(left, middle - WIDE / 2, 50, WIDE, "activations")
                drawn.text(left + 25, middle + 5, "now", "on", "middle")
                continue
            drawn.line(left, middle - WIDE / 2, left + 50, middle - WIDE / 2, "mark")
            drawn.line(left, middle + WIDE / 2, left + 50, middle + WIDE / 2, "mark")
        drawn.line(x, middle - WIDE / 2, x, middle + WIDE / 2, "mark")
        drawn.line(x + 150, middle - WIDE / 2, x + 150, middle + WIDE / 2, "mark")
        drawn.line(x + 200, middle - WIDE / 2, x + 200, middle + WIDE / 2, "mark")
    drawn.text(
        290 + 250, top + 212, "each chunk once in forward, and again in backward", "small", "middle"
    )


def _draw_ends(drawn: Diagram, middle: float) -> None:
    """The input, and the way through the MLP."""
    drawn.rectangle(30, middle - NARROW / 2, 200, NARROW, "activations")
    drawn.text(130, middle + 5, "input, all tokens", "on", "middle")
    drawn.line(238, middle, 282, middle)
    drawn.line(498, middle, 582, middle)
    drawn.text(260, middle - 12, "linear", "small", "middle")
    drawn.text(540, middle - 12, "GELU", "small", "middle")
    drawn.line(798, middle, 842, middle)
    drawn.text(820, middle - 12, "linear", "small", "middle")
    drawn.text(850, middle + 5, "out")
