"""What AdamW keeps of one parameter, and how a block of a moment becomes codes of one byte."""

from tools.diagrams.drawing import Diagram, bytes_of_a_parameter

#: A stretch of a moment, drawn: its largest number is the block's scale.
HEIGHTS = (9, 22, 5, 14, 60, 7, 31, 3, 18, 11, 44, 6, 25, 4, 16, 36, 8, 12, 28, 10)


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        540,
        "AdamW's two moments have 8 bytes of the 16 that a parameter needs. In 8 bits they have 2."
        " A block of 256 numbers is divided by its largest, and each becomes the nearest of 256"
        " values, which lie closer together near zero.",
    )
    _bytes_of_a_parameter(drawn)
    _one_block(drawn)
    return drawn


def _bytes_of_a_parameter(drawn: Diagram) -> None:
    drawn.text(24, 34, "The bytes of one parameter")
    model = [("parameters", 4, "weight, 4"), ("gradients", 4, "gradient, 4")]
    exact = [("optimizer_state", 4, "first moment, 4"), ("optimizer_state", 4, "second, 4")]
    bytes_of_a_parameter(drawn, 54, "AdamW", model + exact, "16 bytes")
    codes = [("optimizer_state", 1, "1")] * 2
    total = "10 bytes, 2 scales for 256 weights"
    bytes_of_a_parameter(drawn, 124, "AdamW in 8 bits", model + codes, total)


def _one_block(drawn: Diagram) -> None:
    left, base, step = 190, 330, 15
    drawn.text(24, 222, "One block of a moment: 256 numbers")
    for number, height in enumerate(HEIGHTS):
        drawn.rectangle(left + number * step, base - height, step - 3, height, "optimizer_state")
    right = left + len(HEIGHTS) * step
    drawn.line(left - 10, base, right + 10, base)
    drawn.line(left - 10, base - max(HEIGHTS), right + 24, base - max(HEIGHTS), "mark")
    drawn.text(right + 32, base - max(HEIGHTS) - 4, "the largest is the scale:")
    drawn.text(right + 32, base - max(HEIGHTS) + 16, "one FP32 number for the block")

    drawn.text(24, 388, "Each number, divided by the scale, becomes the nearest of 256 values:")
    start, end, line = 190, 750, 440
    drawn.line(start - 10, line, end + 10, line)
    for power in range(4):
        count = 2 ** (5 - power)
        low, high = 10.0 ** -(power + 1), 10.0**-power
        for number in range(count):
            value = low + (high - low) * (number + 0.5) / count
            x = start + value * (end - start)
            drawn.line(x, line - 9, x, line + 9)
    drawn.line(end, line - 9, end, line + 9)
    for x, words in ((start, "0"), (end, "1")):
        drawn.text(x, line + 32, words, "small", "middle")
    drawn.text(start + 30, line + 32, "close together near 0", "small")
    drawn.text((start + end) / 2 + 130, line + 32, "far apart near 1", "small", "middle")
    drawn.text(24, 516, "The position in the table is stored: one byte for each number.")
