"""Two receipts compared: what grew, and whether by more than is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from memlab.ledger import COLUMNS
from memlab.receipt.models import Group, Receipt
from memlab.show import Table
from memlab.units import format_bytes, parse_bytes


@dataclass(frozen=True)
class Difference:
    """A receipt and a later one, and whether the later run needs more than is allowed.

    Attributes:
        old, new: the two receipts.
        allowed: the bytes by which `known_bytes` may grow.
    """

    old: Receipt
    new: Receipt
    allowed: int

    @property
    def growth(self) -> int:
        """By how many bytes `known_bytes` grew (negative: it fell)."""
        return self.new.known_bytes - self.old.known_bytes

    @property
    def grew(self) -> bool:
        """Whether it grew by more than is allowed, or grows from step to step and did not."""
        return self.growth > self.allowed or self.creeps

    @property
    def creeps(self) -> bool:
        """Whether the later run grows from step to step, and the earlier one did not."""
        return self.new.verdict.kind == "creep" != self.old.verdict.kind

    def __str__(self) -> str:
        return "\n".join([self._headline(), *self._columns(), *self._blocks(), *self._notes()])

    def _headline(self) -> str:
        old, new = self.old.known_bytes, self.new.known_bytes
        if not self.growth:
            return f"Known bytes {format_bytes(old)} ({old:,} bytes): the same"
        share = f" ({self.growth / old:+.2%})" if old else ""
        verdict = "more than" if self.growth > self.allowed else "within"
        return (
            f"Known bytes {format_bytes(old)} → {format_bytes(new)}: {self.growth:+,} bytes{share},"
            f" {verdict} the {self.allowed:,} bytes that they may grow"
        )

    def _columns(self) -> list[str]:
        rows = []
        for column in COLUMNS:
            old, new = self.old.known_columns[column], self.new.known_columns[column]
            if old != new:
                row = {"column": column.replace("_", " "), "old": format_bytes(old)}
                rows.append({**row, "new": format_bytes(new), "bytes": f"{new - old:+,}"})
        table = Table(rows, numbers={"old", "new", "bytes"}).to_text()
        return [f"  {line}" for line in table.splitlines()]

    def _blocks(self) -> list[str]:
        """The blocks that grew the most, by who made them and where."""
        old, new = _by_place(self.old.blocks), _by_place(self.new.blocks)
        growth = {}
        for place, found in new.items():
            more = sum(group.total for group in found) - sum(g.total for g in old.get(place, ()))
            if more > 0:
                growth[place] = more
        lines = []
        for place in sorted(growth, key=growth.get, reverse=True)[:3]:
            before = ", ".join(map(str, old.get(place, ()))) or "none"
            after = ", ".join(map(str, new[place]))
            column, where = place
            lines.append(f"  {column.replace('_', ' ')}, {where}: {before} → {after}")
        return ["Blocks that grew the most:", *lines] if lines else []

    def _notes(self) -> list[str]:
        old, new = self.old.environment.model_dump(), self.new.environment.model_dump()
        others = [f"{name} {old[name]} → {new[name]}" for name in old if old[name] != new[name]]
        notes = [f"Another environment: {', '.join(others)}"] if others else []
        if self.old.verdict.kind != self.new.verdict.kind:
            notes.append(f"Before: {self.old.verdict.sentence}")
            notes.append(f"Now: {self.new.verdict.sentence}")
        if self.old.outside_bytes != self.new.outside_bytes:
            notes.append(
                f"Not counted, outside of this allocator: {format_bytes(self.old.outside_bytes)} →"
                f" {format_bytes(self.new.outside_bytes)}"
            )
        return notes


def diff(old: Receipt, new: Receipt, at_most: int | str = 0) -> Difference:
    """Compare a run's receipt with an earlier one.

    Args:
        old: the earlier one.
        new: the later one.
        at_most: by how much `known_bytes` may grow: "1%" of the earlier, "64 KiB", or bytes.

    Returns:
        The difference; its text says which column and which blocks grew.

    Raises:
        ValueError: `at_most` is neither a share nor a size.
    """
    return Difference(old, new, _allowed(at_most, old.known_bytes))


def _allowed(at_most: int | str, of: int) -> int:
    if at_most in (0, "0"):
        return 0
    share = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", str(at_most))
    if share:
        return int(of * float(share[1]) / 100)
    try:
        return parse_bytes(at_most)
    except ValueError:
        raise ValueError(
            f'{at_most!r} does not say how much is allowed. Write "1%", "64 KiB" or a number of'
            " bytes"
        ) from None


def _by_place(all_groups: Iterable[Group]) -> dict[tuple[str, str], list[Group]]:
    places: dict[tuple[str, str], list[Group]] = {}
    for group in all_groups:
        places.setdefault((group.column, group.place or "no operator"), []).append(group)
    return places
