"""Widgets: a slider that shows one of several figures drawn beforehand."""

from __future__ import annotations

import html
from collections.abc import Mapping

import ipywidgets

from memlab.figures import Drawing


def knob(
    pictures: Mapping[object, Drawing], description: str, start: object | None = None
) -> ipywidgets.VBox:
    """A slider over the keys of `pictures` that shows the figure belonging to the chosen one.

    The figures are drawn once, now; moving the slider only changes which PNG is shown, so it
    answers at once in JupyterLab and in Colab. A notebook read on the web does not run widgets: set
    a static figure beside it.

    Args:
        pictures: value → figure, in the slider's order.
        description: what the slider turns.
        start: the value shown first; by default the first.

    Raises:
        ValueError: there are no pictures, or `start` is not one of their keys.
    """
    options = list(pictures)
    if not options:
        raise ValueError("a knob needs at least one picture")
    start = options[0] if start is None else start
    if start not in options:
        raise ValueError(f"{start!r} is not one of the knob's values: {options}")
    drawn = {value: figure.png(dpi=110) for value, figure in pictures.items()}
    slider = ipywidgets.SelectionSlider(
        options=[(str(value), value) for value in options],
        value=start,
        description=description,
        style={"description_width": "initial"},
        layout={"width": "600px"},
    )
    image = ipywidgets.Image(value=drawn[start], format="png", layout={"max_width": "860px"})
    text = ipywidgets.HTML(value=_small(pictures[start]), layout={"max_width": "860px"})

    def show(change: dict) -> None:
        image.value = drawn[change["new"]]
        text.value = _small(pictures[change["new"]])

    slider.observe(show, names="value")
    return ipywidgets.VBox([slider, image, text])


def _small(picture: Drawing) -> str:
    return f"<small>{html.escape(picture.alt)}</small>"
