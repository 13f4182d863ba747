"""What is alive in the optimizer's step: a root for all weights at once, for one, or for none."""

from tools.diagrams.drawing import Diagram


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        372,
        "The optimizer's step for six weights, in three ways. All at once makes six temporaries,"
        " one by one makes one, and in place writes over the gradients and makes none.",
    )
    left, panel, box, row, top = 128, 244, 33, 44, 72
    count, current = 6, 2  # six weights, and the one that is being changed
    rows = {
        "weights": "parameters",
        "gradients": "gradients",
        "moments m": "optimizer_state",
        "moments v": "optimizer_state",
    }

    for number, words in enumerate([*rows, "roots of v"]):
        drawn.text(left - 14, top + number * row + 21, words, "small", "end")

    def tensors(start: float) -> None:
        for number, column in enumerate(rows.values()):
            for which in range(count):
                drawn.rectangle(start + which * box, top + number * row, box, box, column)

    def root(start: float, which: int, number: int) -> None:
        x, y = start + which * box, top + number * row
        drawn.rectangle(x, y, box, box, "temporaries")
        drawn.text(x + box / 2, y + 21, "√v", "dark", "middle")

    panels = {
        "All at once": ["a root for each weight:", "4 more bytes a parameter"],
        "One by one": ["a root for one weight, and", "it goes before the next"],
        "In place": ["a root over its gradient,", "which nobody needs any more"],
    }
    for number, (title, caption) in enumerate(panels.items()):
        start = left + number * panel
        drawn.text(start, 46, title)
        tensors(start)
        for line, words in enumerate(caption):
            drawn.text(start, top + 5 * row + 26 + 19 * line, words, "small")

    for which in range(count):
        root(left, which, 4)
    root(left + panel, current, 4)
    for which in range(current + 1):
        root(left + 2 * panel, which, 1)
    return drawn
