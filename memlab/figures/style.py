"""What all figures have in common: palette, the picture that shows itself, title, legend, units."""

from __future__ import annotations

import base64
import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from memlab.ledger import COLUMNS
from memlab.units import GiB, KiB, MiB, format_bytes

#: One colour a column: Okabe and Ito's palette, which people with any colour vision tell apart. In
#: grey print the order, which is always that of `COLUMNS`, and the numbers have to do.
PALETTE = {
    "parameters": "#0072B2",
    "gradients": "#E69F00",
    "optimizer_state": "#009E73",
    "activations": "#D55E00",
    "batch": "#56B4E9",
    "kept": "#CC79A7",
    "temporaries": "#BBBBBB",
    "unattributed": "#FFFFFF",
}

#: What is white on white is hatched and has an edge.
HATCH = {"unattributed": "////"}
EDGE = {"unattributed": "#666666"}

#: Inches: the text width of a book page.
WIDTH = 7.2

#: The size of most letters, in points.
FONT = 9

#: Letters in a line of a title.
TITLE_LETTERS = 88


class Drawing(Figure):
    """A matplotlib figure that shows itself in a notebook as a PNG with an alternative text.

    Attributes:
        alt: the alternative text: what the picture shows, in words.
    """

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        FigureCanvasAgg(self)
        self.set_facecolor("white")
        self.alt = ""

    def png(self, dpi: int = 120) -> bytes:
        """The figure as the bytes of a PNG file, `dpi` pixels an inch of its size."""
        buffer = io.BytesIO()
        # Not bbox_inches="tight": the pictures of one slider have to be of one size.
        self.savefig(buffer, format="png", dpi=dpi, facecolor="auto", metadata={"Software": None})
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_: object) -> tuple[dict, dict]:
        data = {
            "image/png": base64.b64encode(self.png()).decode(),
            "text/plain": self.alt or "figure",
        }
        return data, {"image/png": {"alt": self.alt}}


def drawing(height: float, width: float = WIDTH) -> Drawing:
    """An empty figure in the course's size and style (inches)."""
    return Drawing(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.05))


def headline(figure: Figure, title: str) -> None:
    """Write what happened above a figure, on two lines where one is too short."""
    figure.suptitle(textwrap.fill(title, TITLE_LETTERS), fontsize=FONT + 1.5, x=0.01, ha="left")


def title_height(title: str) -> float:
    """How much higher a figure has to be for its title's second line (inches)."""
    return 0.2 if len(title) > TITLE_LETTERS else 0.0


def style(axes: Axes) -> Axes:
    """The course's plain style: no box, light grid, small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT - 1, length=3)
    axes.grid(True, axis="both", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def lighten(colour: str) -> tuple[float, float, float]:
    """A colour so light that its outline is what is seen: that of what is predicted."""
    red, green, blue = (0.7 + 0.3 * part for part in to_rgb(colour))
    return red, green, blue


def darken(figure: Drawing) -> None:
    """Recolour a figure for a dark page: its greys change places, the columns keep their colours.

    Args:
        figure: a finished figure; it is changed.
    """
    figure.canvas.draw()  # makes the ticks and their labels, which come last
    for artist in [*figure.findobj(Line2D), *figure.findobj(Text)]:
        artist.set_color(_in_the_dark(artist.get_color()))
    # What stands behind a text is no child of the figure.
    behind = [text.get_bbox_patch() for text in figure.findobj(Text) if text.get_bbox_patch()]
    for patch in [*figure.findobj(Patch), *behind]:
        patch.set_facecolor(_in_the_dark(patch.get_facecolor()))
        patch.set_edgecolor(_in_the_dark(patch.get_edgecolor()))
    for collection in figure.findobj(Collection):
        collection.set_facecolor([_in_the_dark(colour) for colour in collection.get_facecolor()])
        collection.set_edgecolor([_in_the_dark(colour) for colour in collection.get_edgecolor()])


def _in_the_dark(colour: object) -> tuple[float, float, float, float]:
    """A grey turned around, black to nearly white; columns and other colours stay as they are."""
    red, green, blue, alpha = to_rgba(colour)
    if not red == green == blue or (red, green, blue) == to_rgb(PALETTE["temporaries"]):
        return red, green, blue, alpha
    grey = 0.86 - 0.77 * red  # white to 0.09, the page's
    return grey, grey, grey, alpha


def legend(figure: Figure, ledgers: Sequence[Mapping[str, int]], predicted: bool = False) -> None:
    """Draw one legend below a figure.

    Args:
        figure: where to draw.
        ledgers: bytes by column. The legend names the columns that can be seen: those with 0.5 % of
            the largest total or more in one of the ledgers.
        predicted: whether to name the mark of a prediction, too.
    """
    largest = max((sum(columns.values()) for columns in ledgers), default=1)
    handles = [
        Patch(
            facecolor=PALETTE[column],
            edgecolor=EDGE.get(column, "none"),
            hatch=HATCH.get(column),
            label=column.replace("_", " "),
        )
        for column in COLUMNS
        if any(columns.get(column, 0) >= 0.005 * largest for columns in ledgers)
    ]
    if predicted:
        mark = Line2D([], [], marker="^", color="black", ls="", ms=5, label="predicted peak")
        handles.append(mark)

    in_a_row = len(handles)
    if in_a_row > 7:
        # Two rows. matplotlib fills a legend by columns; in this order it reads by rows.
        in_a_row = (in_a_row + 1) // 2
        pairs = itertools.zip_longest(handles[:in_a_row], handles[in_a_row:])
        handles = [handle for pair in pairs for handle in pair if handle is not None]

    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=in_a_row,
        fontsize=FONT - 1,
        frameon=False,
        handlelength=1.1,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def unit_for(largest: int) -> tuple[int, str]:
    """The unit in which a figure whose largest value is `largest` bytes is best read.

    Returns:
        Its bytes and its name, such as (1048576, "MiB").
    """
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if largest >= 2 * unit:
            return unit, name
    return 1, "bytes"


def wrap(name: str, width: int) -> str:
    """A name on at most two lines of `width` letters."""
    return "\n".join(textwrap.wrap(name, width, max_lines=2, placeholder="…"))


def in_words(columns: Mapping[str, int]) -> str:
    """A ledger's columns that are not empty, for an alternative text."""
    return ", ".join(
        f"{name.replace('_', ' ')} {format_bytes(columns[name])}"
        for name in COLUMNS
        if columns.get(name)
    )
