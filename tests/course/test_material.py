"""What the documents are made of."""

import base64
import json

import pytest

from memlab.course import material
from memlab.course.notebook import written

PICTURE = b"\x89PNG a picture"


def showing(path, words, tag="readme-figure", picture=PICTURE):
    """A notebook whose one cell shows a picture."""
    data = {"image/png": base64.b64encode(picture).decode(), "text/plain": words}
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    cell = {"cell_type": "code", "metadata": {"tags": [tag]}, "source": "", "outputs": [output]}
    path.write_text(written({"cells": [cell], "metadata": {}}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("Peak 4.00 MiB → 2.00 MiB: x.", "Peak 4.00 MiB → 2.00 MiB: x."),
        ("15.05 GiB less.\nnaive: 15.05 GiB. SDPA: 10.54 GiB.", "15.05 GiB less."),
        (["It has ", "no end"], "It has no end"),
    ],
)
def test_a_figure_is_a_committed_picture_and_one_sentence(tmp_path, words, said):
    path = showing(tmp_path / "03_x.ipynb", words)
    assert material.figure_of([path]) == (PICTURE, said)


def test_there_is_one_figure_or_none(tmp_path):
    first, second = (showing(tmp_path / f"0{n}_x.ipynb", "Words.") for n in (1, 2))
    assert material.figure_of([first], "gpu-figure") is None
    with pytest.raises(ValueError, match="more than one cell is tagged readme-figure"):
        material.figure_of([first, second])


def test_a_sentence_too_long_to_be_listened_to_is_refused(tmp_path):
    longest = "x" * (material.LONGEST_DESCRIPTION - 1) + "."
    path = showing(tmp_path / "01_x.ipynb", longest)
    assert material.figure_of([path])[1] == longest
    showing(path, f"x{longest}")
    with pytest.raises(ValueError, match="described in 251 characters, more than 250"):
        material.figure_of([path])


def test_the_placeholder_is_no_address(tmp_path):
    assert material.address(tmp_path) is None
    for owner, found in (("OWNER", None), ("somebody", "https://github.com/{}/memlab")):
        address = f"https://github.com/{owner}/memlab"
        project = f"[project.urls]\nRepository = {json.dumps(address)}\n"
        (tmp_path / "pyproject.toml").write_text(project, encoding="utf-8")
        assert material.address(tmp_path) == (found and found.format(owner))
