"""A training step's memory: what is constant, what grows in forward, what in backward."""

from tools.diagrams.drawing import Diagram


def draw() -> Diagram:
    """Draw it."""
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
