"""What the loss holds around the end of forward: whole tensors of logits, or one chunk."""

from tools.diagrams.drawing import Diagram


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        580,
        "With a plain loss three tensors of the logits' size are alive at the start of backward."
        " With a fused loss one chunk follows another, and the weight's gradient is there early.",
    )
    left, slot, tall = 100, 118, 56
    middle, right = left + 3 * slot, left + 6 * slot

    def frame(base: float, height: float, title: str) -> None:
        drawn.text(24, base - height - 24, title)
        drawn.line(left, base, right + 20, base)
        drawn.line(left, base, left, base - height)
        drawn.line(middle, base + 24, middle, base - height, "mark")
        drawn.text((left + middle) / 2, base + 20, "end of forward", "small", "middle")
        drawn.text((middle + right) / 2, base + 20, "start of backward", "small", "middle")
        drawn.text(left - 12, base - height + 14, "bytes", "small", "end")

    def whole(base: float, number: int, level: int, words: str, column: str) -> None:
        x, y = left + number * slot, base - (level + 1) * tall
        drawn.rectangle(x, y, slot, tall, column)
        kind = "on" if column == "activations" else "dark"
        drawn.text(x + slot / 2, y + tall / 2 + 5, words, kind, "middle")

    base = 250
    frame(base, 190, "A plain loss: each box is as large as the logits")
    whole(base, 0, 0, "logits", "temporaries")
    for number in range(1, 5):
        whole(base, number, 0, "log-softmax", "activations")
    whole(base, 1, 1, "logits", "temporaries")
    for number in (3, 4):
        whole(base, number, 1, "its gradient", "temporaries")
    whole(base, 4, 2, "logits' gradient", "temporaries")
    whole(base, 5, 0, "logits' gradient", "temporaries")
    drawn.text(left + 5 * slot + 12, base - 2.6 * tall, "the peak: three", "small")
    drawn.text(left + 5 * slot + 12, base - 2.6 * tall + 17, "at once", "small")

    # An eighth of it at a time, and the gradient that forward has computed already.
    base, thin, chunks = 520, tall / 8, 8
    frame(base, 130, "A fused loss: an eighth of the tokens in a chunk")
    drawn.rectangle(left, base - thin, right - left, thin, "gradients")
    width = (middle - left) / chunks
    for number in range(chunks):
        drawn.rectangle(left + number * width, base - 2 * thin, width, thin, "temporaries")
    drawn.text(left + 12, base - 2 * thin - 28, "one chunk after another:", "small")
    drawn.text(left + 12, base - 2 * thin - 10, "its logits, then their gradient", "small")
    drawn.text(middle + 12, base - thin - 28, "computed in forward already:", "small")
    drawn.text(middle + 12, base - thin - 10, "the gradient of the output layer's weight", "small")
    return drawn
