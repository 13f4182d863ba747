"""Micro-batches as rectangles: with a fixed number of documents, and with a token budget."""

from tools.diagrams.drawing import Diagram

LONGEST = 256


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        500,
        "Micro-batches as rectangles, of tokens and padding. With four documents in each, the one"
        " with the longest document is four times as large as it. With a token budget none is"
        " larger than the longest document.",
    )
    left, token, row = 32, 1.3, 20

    def rectangle(x: float, base: float, lengths: list[int]) -> float:
        """Draw a micro-batch, a row for each document, and return where it ends."""
        longest = max(lengths)
        width = token * longest
        for number, length in enumerate(lengths):
            y = base - row * (len(lengths) - number)
            drawn.rectangle(x, y, token * length, row, "activations")
            if length < longest:
                drawn.rectangle(x + token * length, y, width - token * length, row, "temporaries")
        words = f"{len(lengths)} × {longest}"
        drawn.text(x + width / 2, base + 18, words, "small", "middle")
        return x + width

    def legend(x: float, y: float) -> None:
        for column, words in (("activations", "tokens"), ("temporaries", "padding")):
            drawn.rectangle(x, y - 12, 16, 14, column)
            drawn.text(x + 24, y, words, "small")
            x += 96

    documents = [LONGEST // (1 + (5 * number + 5) % 16) for number in range(16)]
    drawn.text(left, 34, "Four documents in each micro-batch")
    legend(left + 600, 34)
    x, base = left, 150
    for start in range(0, len(documents), 4):
        x = 48 + rectangle(x, base, documents[start : start + 4])
    drawn.text(
        x - 48, base - 4 * row - 10, "the largest one: 1,024 tokens with padding", "small", "end"
    )

    drawn.text(left, 218, "A token budget of 256")
    x, base = left, 420
    by_length = sorted(documents, reverse=True)
    for first, end in ((0, 1), (1, 3), (3, 7), (7, 15), (15, 16)):
        x = 34 + rectangle(x, base, by_length[first:end])
    drawn.text(left, 474, "None is larger than the longest document: 256 tokens.", "small")
    return drawn
