"""Micro-batches in time: one tall mountain, or four small ones on gradients that wait."""

from tools.diagrams.drawing import Diagram


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        560,
        "One training step, twice. The whole batch makes one tall mountain of activations. Four"
        " micro-batches make four small ones. The gradients of the first wait under the others.",
    )
    left, end, right = 120, 660, 740
    state, gradients, tall = 56, 30, 144
    whole, small = 1, 4

    def frame(base: float, height: float, title: str) -> None:
        drawn.text(24, base - height - 20, title)
        drawn.line(end, base + 24, end, base - state - gradients - 20, "mark")
        drawn.rectangle(left, base - state, right - left, state, "optimizer_state")
        drawn.text(left + 14, base - state / 2 + 5, "weights and optimizer state", "on")
        drawn.line(left, base, right + 20, base)
        drawn.line(left, base, left, base - height)
        drawn.text((end + right) / 2, base + 20, "optimizer", "small", "middle")
        drawn.text(left - 12, base - height + 14, "bytes", "small", "end")
        drawn.text(right + 28, base + 20, "time", "small")

    def micro_batches(base: float, count: int) -> None:
        """Forward piles activations up; backward takes them down, and adds to the gradients."""
        floor, width, peak = base - state, (end - left) / count, tall / count
        for number in range(count):
            start = left + number * width
            top, stop = start + width / 3, start + width
            under = floor - gradients if number else floor
            corners = [(start, under), (top, under - peak), (stop, floor - gradients)]
            drawn.area([*corners, (top, under)], "activations")
        first = left + width / 3
        corners = [(first, floor), (left + width, floor - gradients), (right, floor - gradients)]
        drawn.area([*corners, (right, floor)], "gradients")

    base = 266
    frame(base, 220, "The whole batch at once")
    micro_batches(base, whole)
    drawn.text(left + 196, base - state - 62, "activations", "on", "middle")
    drawn.text(end - 14, base - state - 10, "gradients", "dark", "end")
    drawn.text(left + 196, base - state - tall - 4, "the peak: all activations", "small")
    drawn.text(left + 90, base + 20, "forward", "small", "middle")
    drawn.text((left + 180 + end) / 2, base + 20, "backward", "small", "middle")

    base = 516
    frame(base, 150, "Four micro-batches")
    micro_batches(base, small)
    for number in range(small):
        x = left + (number + 0.5) * (end - left) / small
        drawn.text(x, base + 20, f"micro-batch {number + 1}", "small", "middle")
    drawn.text(
        end - 14, base - state - 10, "gradients wait for the next micro-batch", "dark", "end"
    )
    drawn.text(
        left + 196,
        base - state - gradients - 52,
        "the peak: a quarter of the activations, and all gradients",
        "small",
    )
    return drawn
