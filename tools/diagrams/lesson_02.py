"""The bytes of one parameter, and where an update goes that is smaller than BF16's spacing."""

from tools.diagrams.drawing import Diagram, bytes_of_a_parameter


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        500,
        "One parameter has 16 bytes under autocast and 8 in BF16. An update that is smaller than"
        " the distance to the next BF16 number is lost, unless it is rounded by chance.",
    )
    _bytes_of_a_parameter(drawn)
    _two_neighbours(drawn)
    return drawn


def _bytes_of_a_parameter(drawn: Diagram) -> None:
    drawn.text(24, 34, "The bytes of one parameter")
    autocast = [
        ("parameters", 4, "weight, 4"),
        ("gradients", 4, "gradient, 4"),
        ("optimizer_state", 8, "optimizer state: two moments, 8"),
    ]
    bytes_of_a_parameter(drawn, 54, "with autocast", autocast, "16 bytes")
    half = [("parameters", 2, "2"), ("gradients", 2, "2"), ("optimizer_state", 4, "4")]
    bytes_of_a_parameter(drawn, 124, "BF16 weights", half, "8 bytes")


def _two_neighbours(drawn: Diagram) -> None:
    one, following = 190, 750
    updated = one + 0.128 * (following - one)
    drawn.text(24, 232, "A weight of 1 gets an update of 0.001. The next BF16 number is 1.0078.")
    for y, title, ways in (
        (300, "to the nearest", ((one, "always"),)),
        (410, "by chance", ((one, "87 of 100"), (following, "13 of 100"))),
    ):
        drawn.text(one - 40, y + 5, title, "", "end")
        drawn.line(one - 20, y, following + 20, y)
        for x, number in ((one, "1"), (following, "1.0078")):
            drawn.line(x, y - 9, x, y + 9)
            drawn.text(x, y + 28, number, "small", "middle")
        drawn.rectangle(updated - 5, y - 5, 10, 10, "temporaries")
        drawn.text(updated, y + 28, "1.001", "small", "middle")
        for x, words in ways:
            # From the sum up, over to where it is rounded, and down.
            drawn.line(updated, y - 8, updated, y - 24, "mark")
            drawn.line(updated, y - 24, x, y - 24, "mark")
            drawn.line(x, y - 24, x, y - 11, "mark")
            anchor = "middle" if x == one else "end"
            drawn.text(x if x == one else x - 14, y - 34, words, "small", anchor)
    drawn.text(one, 474, "The next step starts there. Over many steps the sum is right on average.")
