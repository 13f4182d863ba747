"""A table for people: as text for the terminal, as HTML for a notebook, as Markdown for a page."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of texts, all with the same headings in the same order.

    Args:
        rows: each a mapping from heading to text.
        numbers: the headings of columns that are set to the right.
    """

    rows: Sequence[Mapping[str, str]]
    numbers: Collection[str] = ()

    def to_text(self, *, headings: bool = True) -> str:
        """Return the table in columns of one width each, for the terminal."""
        if not self.rows:
            return ""
        lines = [list(row.values()) for row in self.rows]
        if headings:
            lines.insert(0, list(self.rows[0]))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

        def line(cells: Sequence[str]) -> str:
            padded = []
            for cell, width, heading in zip(cells, widths, self.rows[0], strict=True):
                right = heading in self.numbers
                padded.append(cell.rjust(width) if right else cell.ljust(width))
            return "  ".join(padded).rstrip()

        return "\n".join(map(line, lines))

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        if not self.rows:
            return ""
        headings = list(self.rows[0])
        lines = [headings, ["---:" if name in self.numbers else "---" for name in headings]]
        for row in self.rows:
            lines.append([cell.replace("|", "\\|").replace("\n", " ") for cell in row.values()])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def to_html(self) -> str:
        """Return the table in HTML."""
        if not self.rows:
            return ""

        def cells(tag: str, texts: Sequence[str]) -> str:
            cell = []
            for text, heading in zip(texts, self.rows[0], strict=True):
                side = "right" if heading in self.numbers else "left"
                cell.append(f"<{tag} style='text-align:{side}'>{html.escape(text)}</{tag}>")
            return f"<tr>{''.join(cell)}</tr>"

        body = "".join(cells("td", list(row.values())) for row in self.rows)
        return (
            f"<table><thead>{cells('th', list(self.rows[0]))}</thead><tbody>{body}</tbody></table>"
        )
