"""The two memories, and the trip: forward sends a block's activations to the host, and backward
fetches them.
"""

from tools.diagrams.drawing import Diagram

BLOCKS, STEP, LEFT = 5, 58, 120
TALL = 26


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        460,
        "The GPU holds the activations of one block at a time. Those of the other blocks wait in"
        " the host's memory, from their forward to their backward.",
    )
    forward_ends = LEFT + BLOCKS * STEP
    backward_begins = forward_ends + STEP  # the loss is between them
    right = backward_begins + BLOCKS * STEP
    gpu, host = 120, 400

    drawn.text(24, 40, "GPU")
    drawn.text(LEFT, 40, "forward", "small")
    drawn.text(backward_begins, 40, "backward", "small")
    drawn.line(LEFT, gpu, right + 20, gpu)
    drawn.rectangle(forward_ends, gpu - 16, STEP, 16, "temporaries")
    drawn.text(forward_ends + STEP / 2, gpu - 24, "loss", "small", "middle")

    drawn.text(24, 205, "PCIe")
    drawn.text(24, 340, "Host")
    drawn.line(LEFT, host, right + 20, host)
    drawn.text(LEFT, host + 26, "what is not needed now waits here", "small")

    for number in range(BLOCKS):
        leaves = LEFT + (number + 1) * STEP
        returns = backward_begins + (BLOCKS - 1 - number) * STEP
        top = host - (number + 1) * TALL

        for x in (leaves - STEP, returns):
            drawn.rectangle(x, gpu - 44, STEP, 44, "activations")
            drawn.text(x + STEP / 2, gpu - 17, f"{number + 1}", "on", "middle")

        drawn.rectangle(leaves, top, returns - leaves, TALL, "activations")
        words = "block 1: all its activations" if number == 0 else f"{number + 1}"
        drawn.text(leaves + 12, top + 18, words, "on")

        _arrow(drawn, leaves + 5, gpu + 8, top - 6)
        _arrow(drawn, returns - 5, top - 6, gpu + 8)
    return drawn


def _arrow(drawn: Diagram, x: float, start: float, end: float) -> None:
    """A vertical arrow, with its point at `end`."""
    back = -9 if end > start else 9
    drawn.line(x, start, x, end + back)
    drawn.area([(x - 5, end + back), (x + 5, end + back), (x, end)], "activations")
