"""A receipt as one HTML page that needs nothing else: no network, no script, light and dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path

from memlab import figures
from memlab.figures import PALETTE, Drawing
from memlab.forms import replace
from memlab.ledger import COLUMNS
from memlab.measurement import Measurement
from memlab.units import format_bytes

#: How many groups of blocks the page names.
LARGEST = 12

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1f2328; --soft: #656d76;
        --line: #d8dee4; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --back: #171717; --text: #dcdcdc; --soft: #9aa0a6; --line: #3c4043; --card: #232527; } }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
       margin: 2rem auto; max-width: 60rem; padding: 0 1.25rem; }
h1 { font-size: 1.1rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
.peak { font-size: 2.4rem; font-weight: 650; line-height: 1.2; margin: .2rem 0 0; }
.soft, footer { color: var(--soft); }
.why { background: var(--card); border-left: .3rem solid #d55e00; overflow-x: auto;
       padding: .8rem 1rem; white-space: pre-wrap; }
img { display: block; height: auto; max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th { color: var(--soft); font-size: .85rem; font-weight: 500; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem 1.2rem .3rem 0; }
.wide table { font-size: .85rem; white-space: nowrap; }
.bar { background: var(--card); border-radius: .2rem; display: flex; height: 1.1rem;
       margin: .8rem 0; overflow: hidden; }
.key { border-radius: .15rem; display: inline-block; height: .8em; margin-right: .5em;
       outline: 1px solid var(--line); width: .8em; }
details { margin-top: 2rem; }
pre { overflow-x: auto; }
footer { border-top: 1px solid var(--line); font-size: .85rem; margin-top: 1.5rem;
         padding-top: .8rem; }
"""


def write(path: Path, measurement: Measurement, title: str, why: Sequence[str] = ()) -> None:
    """Write a measurement as one self-contained HTML page.

    Args:
        path: the file.
        measurement: what is shown.
        title: what was measured.
        why: why it did not fit, in lines, where it did not (`memlab.remedies`).
    """
    replace(path, page(measurement, title, why))


def page(measurement: Measurement, title: str, why: Sequence[str] = ()) -> str:
    """A measurement as the text of an HTML page; the same arguments as those of `write`."""
    sections = [_head(measurement, title)]
    if len(measurement.steps) > 1:
        sections.append(f"<p>{html.escape(measurement.verdict.sentence)}</p>")
    if why:
        sections.append(f"<div class='why'>{html.escape(chr(10).join(why))}</div>")
    sections.append(_columns(measurement))
    if measurement.ledger.blocks:
        sections.append(_section("Over time", _picture(lambda: figures.timeline(measurement))))
        largest = measurement.groups(LARGEST).table().to_html()
        sections.append(_section("The largest blocks at the peak", largest))
    if sum(step.peak_bytes is not None for step in measurement.steps) > 1:
        sections.append(_section("Step by step", _picture(lambda: figures.steps(measurement))))
    if measurement.holders:
        lines = "".join(f"<li>{html.escape(str(holder))}</li>" for holder in measurement.holders)
        sections.append(_section("Who holds what grows", f"<ul>{lines}</ul>"))
    sections.append(_foot(measurement))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}: {format_bytes(measurement.peak_bytes)}</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _section(heading: str, content: str) -> str:
    return f"<h2>{html.escape(heading)}</h2>\n<div class='wide'>{content}</div>"


def _head(measurement: Measurement, title: str) -> str:
    gpu = measurement.environment["gpu"] or measurement.environment["device"]
    where = f"at the peak, in {measurement.phase}, on {gpu} ({measurement.peak_bytes:,} bytes)"
    return (
        f"<h1>{html.escape(title)}</h1>\n"
        f"<p class='peak'>{format_bytes(measurement.peak_bytes)}</p>\n"
        f"<p class='soft'>{html.escape(where)}</p>"
    )


def _columns(measurement: Measurement) -> str:
    """The peak as one bar, and its columns as a table."""
    peak = max(measurement.peak_bytes, 1)
    stretches, rows = [], []
    for column in COLUMNS:
        size = measurement.columns[column]
        if not size:
            continue
        name, share = column.replace("_", " "), size / peak
        stretches.append(
            f"<span style='background:{PALETTE[column]};width:{share:.4%}' title='{name}'></span>"
        )
        rows.append(
            f"<tr><td><span class='key' style='background:{PALETTE[column]}'></span>{name}</td>"
            f"<td style='text-align:right'>{format_bytes(size)}</td>"
            f"<td style='text-align:right'>{share:.1%}</td></tr>"
        )
    return f"<div class='bar'>{''.join(stretches)}</div>\n<table>{''.join(rows)}</table>"


def _picture(draw: Callable[[], Drawing]) -> str:
    """A figure drawn twice, for light pages and for dark ones: the browser shows one of them."""
    light, dark = draw(), draw()
    figures.darken(dark)
    source = (
        f"<source media='(prefers-color-scheme: dark)' srcset='{_inline(dark)}'>"
        f"<img src='{_inline(light)}' alt='{html.escape(light.alt, quote=True)}'>"
    )
    return f"<picture>{source}</picture>"


def _inline(figure: Drawing) -> str:
    return "data:image/png;base64," + base64.b64encode(figure.png(dpi=200)).decode()


def _foot(measurement: Measurement) -> str:
    known = {name: value for name, value in measurement.environment.items() if value is not None}
    environment = ", ".join(f"{name} {value}" for name, value in known.items())
    return (
        f"<details><summary>As text</summary><pre>{html.escape(str(measurement))}</pre></details>\n"
        f"<footer>{html.escape(environment)}</footer>"
    )
