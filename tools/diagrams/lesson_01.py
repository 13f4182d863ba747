"""What has 32 bits during a step, and what has 16: a bar is as high as its numbers are wide."""

from tools.diagrams.drawing import Diagram


def draw() -> Diagram:
    """Draw it."""
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
