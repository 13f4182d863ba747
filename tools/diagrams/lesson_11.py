"""The ladder: seven lines, and what each leaves of the columns."""

from tools.diagrams.drawing import Diagram

#: The columns, with the width of each where nothing is on.
COLUMNS = {
    "parameters": ("weights", 66),
    "gradients": ("gradients", 66),
    "optimizer_state": ("optimizer state", 132),
    "activations": ("activations", 170),
    "temporaries": ("logits", 110),
}
#: A line, what it leaves of the columns that it shrinks, and how.
LINES = (
    ("naive", {}, ""),
    ("SDPA", {"activations": 0.6}, "no scores"),
    ("BF16 autocast", {"activations": 0.4}, "16 bits"),
    ("fused loss", {"temporaries": 0.06}, "a chunk"),
    ("checkpoints", {"activations": 0.06}, "inputs only"),
    (
        "BF16 weights",
        {"parameters": 0.5, "gradients": 0.5, "optimizer_state": 0.5},
        "half",
    ),
    ("8-bit AdamW", {"optimizer_state": 0.25}, "a byte each"),
)
LEFT, GAP, PITCH, TALL = 150, 22, 50, 28


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        510,
        "A ladder of seven rows. Each line makes one or a few columns smaller: SDPA and BF16 the"
        " activations, the fused loss the logits, checkpoints the activations again, BF16 weights"
        " weights, gradients and state, 8-bit AdamW the state.",
    )
    drawn.text(24, 36, "One line at a time: what is left of each column (not to scale)")
    x = LEFT
    for column, (title, width) in COLUMNS.items():
        drawn.text(x, 74, title, "small")
        for row in range(len(LINES)):
            y = 88 + row * PITCH
            share, changed, how = _share(column, row)
            drawn.rectangle(x, y, width * share, TALL, column)
            if changed and how:
                inside = width * share > 60
                where = x + 8 if inside else x + width * share + 6
                kind = ("on" if column != "gradients" else "dark") if inside else "small"
                drawn.text(where, y + 19, how, kind)
        x += width + GAP
    for row, (name, _, _) in enumerate(LINES):
        drawn.text(LEFT - 16, 88 + row * PITCH + 19, name, "", "end")
    base = 88 + len(LINES) * PITCH + 12
    drawn.text(
        LEFT,
        base + 8,
        "Each line is added to those above it. A column that is small already",
        "small",
    )
    drawn.text(LEFT, base + 28, "has nothing more to give: so the order counts.", "small")
    return drawn


def _share(column: str, row: int) -> tuple[float, bool, str]:
    """What is left of a column in a row, whether the row's line did it, and how."""
    share = 1.0
    for _, leaves, _ in LINES[: row + 1]:
        share = leaves.get(column, share)
    _, leaves, how = LINES[row]
    return share, column in leaves, how
