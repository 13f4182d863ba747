"""Who holds which slice of each layer, and what a rank has while a layer computes."""

from tools.diagrams.drawing import Diagram

RANKS = 4
LAYERS = 4
COMPUTES = 2  # this layer, counted from 0
WIDTH = 34  # of a slice
TALL = 30
PITCH = 42  # from layer to layer
APART = 180  # from rank to rank


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        470,
        "Each of four ranks holds a quarter of every layer's weights, gradients and optimizer"
        " state. While a layer computes, each rank has its weights whole. Each rank has its own"
        " activations.",
    )
    left, top = 140, 100
    drawn.text(24, 36, "Four ranks. Layer 3 computes: its weights are gathered on every rank")
    for layer in range(LAYERS):
        y = top + (LAYERS - 1 - layer) * PITCH
        drawn.text(left - 16, y + 20, f"layer {layer + 1}", "small", "end")
    for rank in range(RANKS):
        _weights(drawn, left + rank * APART, top, rank)

    base = top + LAYERS * PITCH + 14
    quarters = (("gradients", WIDTH), ("optimizer_state", 2 * WIDTH))
    for number, (column, width) in enumerate(quarters):
        y = base + number * 32
        drawn.text(left - 16, y + 15, column.replace("_", " "), "small", "end")
        for rank in range(RANKS):
            x = left + rank * APART
            drawn.rectangle(x, y, width, 22, column)
            drawn.text(x + width + 8, y + 15, "a quarter", "small")
    y = base + 64
    drawn.text(left - 16, y + 20, "activations", "small", "end")
    for rank in range(RANKS):
        x = left + rank * APART
        drawn.rectangle(x, y, RANKS * WIDTH, TALL, "activations")
        drawn.text(x + RANKS * WIDTH / 2, y + 20, "all of its tokens", "on", "middle")
    drawn.text(
        left, y + 64, "Numbered: slices that a rank keeps. Without a number: gathered", "small"
    )
    drawn.text(left, y + 84, "for a moment, in forward and once more in backward.", "small")
    return drawn


def _weights(drawn: Diagram, x: float, top: float, rank: int) -> None:
    """The weights that one rank holds: a slice of each layer, and one layer whole."""
    drawn.text(x + RANKS * WIDTH / 2, top - 16, f"rank {rank}", "", "middle")
    for layer in range(LAYERS):
        y = top + (LAYERS - 1 - layer) * PITCH
        right = x + RANKS * WIDTH
        if layer != COMPUTES:
            drawn.line(x, y, right, y, "mark")
            drawn.line(x, y + TALL, right, y + TALL, "mark")
            drawn.line(x, y, x, y + TALL, "mark")
            drawn.line(right, y, right, y + TALL, "mark")
        for slice_of in range(RANKS):
            if slice_of == rank or layer == COMPUTES:
                drawn.rectangle(x + slice_of * WIDTH, y, WIDTH, TALL, "parameters")
        drawn.text(x + (rank + 0.5) * WIDTH, y + 20, f"{layer + 1}", "on", "middle")
