"""Which activations are kept: all of six blocks, or the inputs and one block at a time."""

from tools.diagrams.drawing import Diagram


def draw() -> Diagram:
    """Draw it."""
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
