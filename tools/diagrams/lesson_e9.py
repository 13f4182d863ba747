"""Gradients that wait for the optimizer, and gradients that go as they come."""

from tools.diagrams.drawing import Diagram


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        436,
        "Above, the gradients of six layers come in backward and wait for the optimizer. Below,"
        " each layer is stepped as soon as its gradient is there, and the gradient goes.",
    )
    layers, left, step, tall = 6, 130, 80, 26
    end = left + layers * step  # of backward
    right = end + 110

    def frame(base: float, height: float, title: str) -> None:
        drawn.text(24, base - height - 24, title)
        drawn.line(left, base, right + 20, base)
        drawn.line(left, base, left, base - height)
        drawn.text(left - 12, base - height / 2 + 5, "gradients", "small", "end")
        drawn.text(right + 28, base + 5, "time", "small")

    base = 226
    frame(base, layers * tall + 14, "The optimizer after backward")
    for number in range(layers):
        x = left + number * step
        y = base - (number + 1) * tall
        drawn.rectangle(x, y, right - x, tall, "gradients")
        drawn.text(x + 10, y + 18, f"layer {layers - number}", "dark")
    drawn.line(end, base + 26, end, base - layers * tall - 14, "mark")
    drawn.text((left + end) / 2, base + 22, "backward", "small", "middle")
    drawn.text((end + right) / 2, base + 22, "all are stepped", "small", "middle")
    drawn.text(left + 20, base - layers * tall + 14, "each waits for all others", "small")

    base = 376
    frame(base, 2 * tall + 14, "The optimizer in backward")
    for number in range(layers):
        x = left + number * step
        drawn.rectangle(x, base - tall, step, tall, "gradients")
        drawn.text(x + 10, base - tall + 18, f"layer {layers - number}", "dark")
        drawn.text(x + step - 4, base + 18, "step", "small", "end")
        drawn.line(x + step, base + 22, x + step, base)
    drawn.text((left + end) / 2, base + 40, "backward", "small", "middle")
    drawn.text(left + 20, base - 2 * tall + 4, "one at a time, and then it is gone", "small")
    return drawn
