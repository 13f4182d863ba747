"""The page: all of the receipt, in one file that needs nothing else."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from memlab import measure
from memlab.page import page, write


def train():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in torch.randn(2, 32, 64):
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


@pytest.fixture(scope="module")
def measurement():
    return measure(train)


class Tags(HTMLParser):
    """The tags of a page with their attributes; that they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.open = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_says_what_the_measurement_says(measurement, tmp_path):
    write(tmp_path / "report.html", measurement, "a <b> & c")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags(text)
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in text and f"({measurement.peak_bytes:,} bytes)" in text
    widths = [float(width) for width in re.findall(r";width:([\d.]+)%", text)]
    assert len(widths) == sum(map(bool, measurement.columns.values()))
    assert sum(widths) == pytest.approx(100, abs=0.01)
    assert "optimizer state</td>" in text and str(measurement).splitlines()[0] in text
    assert {"details", "picture", "table"} <= {tag for tag, _ in tags.found}


def test_the_page_needs_nothing_else(measurement):
    for tag, attributes in Tags(page(measurement, "x")).found:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:image/png;base64,"[:5])


def test_there_is_a_picture_for_light_pages_and_one_for_dark_ones(measurement):
    tags = dict(reversed(Tags(page(measurement, "x")).found))  # the first of each
    assert tags["source"]["media"] == "(prefers-color-scheme: dark)"
    assert tags["img"]["alt"].startswith("Timeline of memory")
    corners = []
    for address in (tags["img"]["src"], tags["source"]["srcset"]):
        picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        corners.append(picture.convert("RGB").getpixel((1, 1)))
    assert corners == [(255, 255, 255), (0x17, 0x17, 0x17)]
    assert "--back: #171717" in page(measurement, "x")


def test_the_page_shows_the_verdict_and_the_steps(measurement):
    text = page(measurement, "x")
    assert f"<p>{measurement.verdict.sentence}</p>" in text
    assert "<h2>Step by step</h2>" in text and "Who holds" not in text


def test_why_it_did_not_fit_stands_first(measurement):
    text = page(measurement, "x", ["too large: <b>", "try less"])
    assert "too large: &lt;b&gt;\ntry less" in text and text.index("too large") < text.index("bar'")
    assert "class='why'" not in page(measurement, "x")


def test_a_run_that_allocated_nothing_has_a_page():
    from tests.test_remedies import measured

    assert "0 B" in page(measured(), "x")
