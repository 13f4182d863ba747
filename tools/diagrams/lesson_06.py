"""The way of a batch: from a mapped file, through the host, to the GPU."""

from tools.diagrams.drawing import Diagram

GPU, HOST = 500, 40
RIGHT = 830


def draw() -> Diagram:
    """Draw it."""
    drawn = Diagram(
        860,
        480,
        "With the data set on the GPU it takes memory for the whole training. Streamed, it stays in"
        " a file, and on the GPU are the batch in use and the next one.",
    )
    top, height = 60, 140
    drawn.text(HOST, top - 20, "The data set on the GPU")
    _frame(drawn, HOST, top, 380, height, "host")
    _frame(drawn, GPU, top, RIGHT - GPU, height, "GPU")
    _file(drawn, top + 46)
    drawn.rectangle(GPU + 16, top + 16, 200, 90, "kept")  # four times the file
    drawn.text(GPU + 116, top + 65, "data set, int64", "dark", "middle")
    _in_use(drawn, top + 31)

    top = 280
    drawn.text(HOST, top - 20, "Streamed")
    _frame(drawn, HOST, top, 380, height, "host")
    _frame(drawn, GPU, top, RIGHT - GPU, height, "GPU")
    _file(drawn, top + 46)
    for number in range(3):
        drawn.rectangle(HOST + 230 + 44 * number, top + 46, 40, 30, "batch")
    drawn.text(HOST + 294, top + 97, "batches wait, pinned", "small", "middle")
    _arrow(drawn, HOST + 172, HOST + 222, top + 61)
    drawn.rectangle(GPU + 46, top + 46, 40, 30, "batch")
    drawn.text(GPU + 66, top + 97, "the next one", "small", "middle")
    _in_use(drawn, top + 31)
    _arrow(drawn, HOST + 388, GPU - 8, top + 61)
    drawn.text(460, top + 45, "PCIe", "small", "middle")
    drawn.text(
        HOST,
        top + height + 36,
        "However large the file is, the GPU holds two batches of it.",
        "small",
    )
    return drawn


def _frame(drawn: Diagram, x: float, y: float, width: float, height: float, name: str) -> None:
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
    for (from_x, from_y), (to_x, to_y) in zip(corners, corners[1:], strict=False):
        drawn.line(from_x, from_y, to_x, to_y)
    drawn.text(x + 12, y + height - 10, name, "small")


def _file(drawn: Diagram, y: float) -> None:
    """The file: a quarter of the bytes of int64."""
    drawn.rectangle(HOST + 16, y, 150, 30, "kept")
    drawn.text(HOST + 91, y + 20, "file, uint16", "dark", "middle")


def _in_use(drawn: Diagram, y: float) -> None:
    drawn.rectangle(RIGHT - 88, y, 72, 60, "batch")
    drawn.text(RIGHT - 52, y + 35, "in use", "dark", "middle")


def _arrow(drawn: Diagram, x: float, to_x: float, y: float) -> None:
    drawn.line(x, y, to_x - 8, y)
    drawn.area([(to_x - 8, y - 5), (to_x - 8, y + 5), (to_x, y)], "batch")
