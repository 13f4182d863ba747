"""An MLP's two matrices: with a mask they keep their size, and cut they become smaller."""

from tools.diagrams.drawing import Diagram

CELL = 18
WIDTH = 4  # of the model, in cells
CHANNELS = 8
#: A mask keeps the weights with a cross: they stand in every row and every column.
MASK = ("xx..", "x..x", ".xx.", "..xx", "xx..", ".x.x", "x.x.", "..xx")
ZEROS = {
    (row, column) for row, kept in enumerate(MASK) for column in range(WIDTH) if kept[column] != "x"
}


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        520,
        "An MLP twice. With a mask half of the weights are zeros, and both matrices and all"
        " channels keep their size. Cut, half of the rows, columns and channels remain.",
    )

    def cells(x: float, y: float, rows: int, columns: int, kind: str, zeros: set) -> None:
        for row in range(rows):
            for column in range(columns):
                is_zero = (row, column) in zeros
                colour = "temporaries" if is_zero else kind
                drawn.rectangle(x + CELL * column, y + CELL * row, CELL, CELL, colour)

    def mlp(y: float, channels: int, zeros: set) -> None:
        """The matrix that makes the channels, the channels, and the matrix that reads them."""
        make, middle, read = 90, 280, 420
        height = CELL * channels
        cells(make, y, channels, WIDTH, "parameters", zeros)
        cells(middle, y, channels, 1, "activations", set())
        top = y + (height - CELL * WIDTH) / 2
        turned = {(column, row) for row, column in zeros}
        cells(read, top, WIDTH, channels, "parameters", turned)
        below = y + height + 22
        drawn.text(make + CELL * WIDTH / 2, below, "makes channels", "small", "middle")
        drawn.text(middle + CELL / 2, below, f"{channels} channels", "small", "middle")
        drawn.text(read + CELL * channels / 2, below, "reads channels", "small", "middle")

    drawn.text(24, 36, "A mask: half of the weights are zeros")
    mlp(64, CHANNELS, ZEROS)
    drawn.text(620, 130, "No matrix is smaller,", "small")
    drawn.text(620, 150, "and the mask is one more.", "small")

    drawn.text(24, 296, "A cut: half of the channels are gone")
    mlp(332, CHANNELS // 2, set())
    drawn.text(620, 360, "Rows, columns and", "small")
    drawn.text(620, 380, "channels are gone.", "small")

    for number, (column, words) in enumerate(
        (("parameters", "weights"), ("temporaries", "zeros"), ("activations", "activations"))
    ):
        x = 90 + 130 * number
        drawn.rectangle(x, 470, 16, 14, column)
        drawn.text(x + 24, 482, words, "small")
    return drawn
