"""The palette, the picture that shows itself, the legend and the units."""

import base64
import gc
import itertools
import struct
import sys
import weakref

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from memlab import figures
from memlab.ledger import COLUMNS
from memlab.units import GiB, KiB, MiB
from tests.figures.reading import EVERYTHING, LONG_TITLE, in_legend, ledger, of_length, words


def picture():
    return figures.timeline(of_length(1))


def test_every_column_has_a_colour_of_its_own():
    assert tuple(figures.PALETTE) == COLUMNS
    colours = [np.array(to_rgb(colour)) for colour in figures.PALETTE.values()]
    assert min(np.abs(a - b).sum() for a, b in itertools.combinations(colours, 2)) > 0.3


def test_a_figure_shows_itself_as_a_png_with_an_alternative_text():
    figure = picture()
    data, metadata = figure._repr_mimebundle_(include=None, exclude=None)
    assert data.keys() == {"image/png", "text/plain"}
    assert data["text/plain"] == figure.alt and figure.alt.startswith("Timeline of memory")
    assert metadata == {"image/png": {"alt": figure.alt}}
    png = base64.b64decode(data["image/png"])
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (round(7.2 * 120), round(3.0 * 120))
    assert struct.unpack(">II", figure.png(dpi=50)[16:24]) == (360, 150)
    # No version of matplotlib, no date: the same run gives the same file.
    assert b"matplotlib" not in png and picture().png() == png


def test_it_shows_itself_in_ipython():
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    figure = picture()
    data, metadata = formatter.format(figure)
    assert data["text/plain"] == figure.alt and metadata["image/png"]["alt"] == figure.alt
    assert "image/png" in data


def test_pyplot_is_left_alone():
    imported = "matplotlib.pyplot" in sys.modules
    if imported:
        from matplotlib import pyplot

        before = pyplot.get_fignums()
    figures.comparison({"before": of_length(1), "after": of_length(2)}, "Title").png()
    assert ("matplotlib.pyplot" in sys.modules) == imported
    if imported:
        assert pyplot.get_fignums() == before


def test_a_figure_that_is_not_needed_any_more_goes():
    figure = picture()
    figure.png()
    gone = weakref.ref(figure)
    del figure
    gc.collect()
    assert gone() is None


def test_the_legend_names_what_can_be_seen():
    figure = figures.drawing(2)
    seen = ledger(parameters=994, activations=5)
    figures.legend(figure, [seen, ledger(gradients=1, batch=4, temporaries=6)])
    assert in_legend(figure) == ["parameters", "activations", "temporaries"]


def test_the_legend_reads_by_rows():
    figure = figures.ledgers({"all": EVERYTHING}, "Title", {"all": 700 * MiB})
    boxes = {text: box for text, box, _ in words(figure)}
    names = [column.replace("_", " ") for column in COLUMNS] + ["predicted peak"]
    assert sorted(names, key=lambda name: (-round(boxes[name].y0), boxes[name].x0)) == names


def test_a_long_title_has_two_lines():
    figure = figures.drawing(2)
    for title, lines in (("Short", 1), (LONG_TITLE, 2)):
        figures.headline(figure, title)
        assert len(figure.get_suptitle().splitlines()) == lines
        assert figure.get_suptitle().replace("\n", " ") == title


@pytest.mark.parametrize(
    "size, unit, name",
    [(3 * GiB, GiB, "GiB"), (2 * GiB - 1, MiB, "MiB"), (3 * KiB, KiB, "KiB"), (900, 1, "bytes")],
)
def test_the_unit_fits_the_largest(size, unit, name):
    assert figures.unit_for(size) == (unit, name)
