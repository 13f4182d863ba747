"""What a run's steps say, in one sentence: steady, growing, or as large as the longest batch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from memlab.holders import Holder
from memlab.ledger import Ledger, Step, left_by, numbers_in
from memlab.units import KiB, format_bytes

# Less than this a step is a few numbers, and no reason to worry.
_LEAST_GROWTH = KiB

# The host's heap breathes: what a step leaves there has to be more than this to be said.
_LEAST_HOST_GROWTH = 4 * KiB
_LEAST_SLOPES = 8


@dataclass(frozen=True)
class Growth:
    """What each step leaves behind, and nobody owns.

    Attributes:
        column: what it was for in its step.
        operator, module: who made it, where.
        bytes_a_step: how much of it a step leaves, on average.
        addresses: where it lies.
    """

    column: str
    operator: str
    module: str
    bytes_a_step: int
    addresses: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        """Who made it, for people: `aten::linear in layers.0`."""
        return " in ".join(part for part in (self.operator, self.module) if part)


@dataclass(frozen=True)
class Verdict:
    """What the steps say.

    Attributes:
        kind: "steady", "creep", "creep ended", "longest batch", "building" or "unknown".
        sentence: the same for people.
        bytes_a_step: by how much a step makes it grow; 0 where nothing grows.
        column, operator, module, holder: of what grows, where it is known.
    """

    kind: str
    sentence: str
    bytes_a_step: int = 0
    column: str = ""
    operator: str = ""
    module: str = ""
    holder: str = ""


def growth_of(ledger: Ledger, steps: Sequence[Step]) -> list[Growth]:
    """What the steps of a ledger left behind, the largest first.

    Args:
        ledger: what was recorded.
        steps: its steps, two or more. The last one says nothing: what it leaves may go yet.
    """
    # The first step makes what stays for good, such as an optimizer's state.
    judged = [step for step in steps[:-1] if step.number > 1 or len(steps) == 2]
    places: dict[tuple[str, str, str], list] = {}
    for step, block in left_by(ledger, steps):
        if step in judged:
            places.setdefault((block.column, block.operator, block.module), []).append(block)
    found = []
    for place, blocks in places.items():
        size = sum(block.bytes for block in blocks) // len(judged)
        found.append(Growth(*place, size, tuple(block.address for block in blocks)))
    return sorted(found, key=lambda growth: -growth.bytes_a_step)


def verdict_of(
    steps: Sequence[Step],
    growth: Sequence[Growth] = (),
    building_peak: int | None = None,
    holders: Sequence[Holder] = (),
) -> Verdict:
    """Say what the steps say.

    Args:
        steps: all steps of the run, in order.
        growth: what they leave behind, the largest first.
        building_peak: the most bytes before the first step (None: not known).
        holders: who holds it, where it is known.
    """
    full = [step for step in steps if step.peak_bytes is not None]
    if len(full) < 2:
        kind = "unknown" if not building_peak or not full else "building"
        if kind == "building" and building_peak > full[0].peak_bytes:
            return _building(full, building_peak)
        return Verdict("unknown", "One step alone does not say whether it goes on like this.")
    changes = _changes(full)
    if _creeps(changes, growth):
        return _creep(full, changes, growth, holders)
    if building_peak is not None and building_peak > max(step.peak_bytes for step in full):
        return _building(full, building_peak)
    if _ended_growing(changes):
        return _ended(full, changes)
    return _longest(full) or Verdict("steady", _steady(full))


def host_growth(steps: Sequence[Step]) -> int | None:
    """The bytes that a step leaves on the host's heap, beside what it leaves on the device.

    Steps that were recorded in full do not tell it: the record itself lies on the heap.

    Returns:
        Bytes a step; None where the heap does not move, or is not known.
    """
    slopes = []
    for before, after in zip(steps, steps[1:], strict=False):
        recorded = before.peak_bytes is not None or after.peak_bytes is not None
        if not recorded and None not in (before.host_bytes, after.host_bytes):
            slopes.append(after.host_bytes - before.host_bytes)
    if len(slopes) < _LEAST_SLOPES:
        return None
    full = [step for step in steps if step.bytes_left is not None]
    changes = _changes(full)
    on_device = max(0, round(statistics.median(changes))) if changes else 0
    slope = round(statistics.median(slopes)) - on_device
    return slope if slope >= _LEAST_HOST_GROWTH else None


def _changes(steps: Sequence[Step]) -> list[int]:
    """By how much a step left more than the one before it. The first makes what stays for good."""
    judged = steps[1:] if len(steps) > 2 else steps
    return [
        round((after.bytes_left - before.bytes_left) / (after.number - before.number))
        for before, after in zip(judged, judged[1:], strict=False)
    ]


def _creeps(changes: Sequence[int], growth: Sequence[Growth]) -> bool:
    """Whether it goes on growing: one of the last two steps did, and so did most. (After the last
    one a loop's variables may be gone.)
    """
    if not changes or max(changes[-2:]) < _LEAST_GROWTH:
        return False
    # A single change may be a loop's variable that is set anew.
    return bool(growth) if len(changes) == 1 else statistics.median(changes) >= _LEAST_GROWTH


def _ended_growing(changes: Sequence[int]) -> bool:
    """Whether it grew, never shrank, and came to rest."""
    # (After the last step a loop's variables may be gone.)
    grew = any(change >= _LEAST_GROWTH for change in changes)
    shrank = any(change <= -_LEAST_GROWTH for change in changes[:-1])
    return grew and not shrank and len(changes) > 2 and max(changes[-2:]) < _LEAST_GROWTH


def _creep(
    steps: Sequence[Step],
    changes: Sequence[int],
    growth: Sequence[Growth],
    holders: Sequence[Holder],
) -> Verdict:
    size = round(statistics.median(change for change in changes if change > 0))
    first = 1 if len(steps) > 2 else 0
    # Where it is highest: when the loop's function returns, what it held goes with the last step.
    before = steps[first].columns_after
    last = max(steps[first:], key=lambda step: step.bytes_left).columns_after
    column = max(last, key=lambda name: last[name] - before[name])
    largest = growth[0] if growth and column == "kept" else Growth(column, "", "", size)

    words = f"It grows by {format_bytes(size)} a step ({size:,} bytes): {column.replace('_', ' ')}"
    if largest.place:
        words += f", {largest.column.replace('_', ' ')} made by {largest.place}"
    holder = holders[0].path if holders else ""
    if holder:
        words += f", held by {holder}"
        of_graph = (h.frees for h in holders if h.kind == "graph" and holder in h.path)
        advice = next(of_graph, holders[0].frees)
        words += f" ({advice})" if advice else ""
    if len(changes) == 1:
        words += f". {len(steps)} steps cannot tell whether that goes on: measure more"
    return Verdict("creep", words + ".", size, column, largest.operator, largest.module, holder)


def _ended(steps: Sequence[Step], changes: Sequence[int]) -> Verdict:
    last = max(index for index, change in enumerate(changes) if change >= _LEAST_GROWTH)
    number = steps[-len(changes) + last].number
    total = sum(change for change in changes if change > 0)
    return Verdict(
        "creep ended",
        f"It grew by {format_bytes(total)} until step {number}, and not after that.",
    )


def _building(steps: Sequence[Step], building_peak: int) -> Verdict:
    of_steps = max(step.peak_bytes for step in steps)
    return Verdict(
        "building",
        f"The peak, {format_bytes(building_peak)}, is that of building; the steps need"
        f" {format_bytes(of_steps)}.",
    )


def _longest(steps: Sequence[Step]) -> Verdict | None:
    """The peak follows the batch: where it is largest, the shape is."""
    judged = [step for step in steps[1:] if step.shapes]
    sizes = {step.number: numbers_in(step.largest_shape) for step in judged}
    if len(set(sizes.values())) < 2:
        return None
    longest = max(sizes.values())
    with_longest = [step for step in judged if sizes[step.number] == longest]
    others = [step for step in judged if sizes[step.number] < longest]
    if len(with_longest) > len(others):  # it is the usual one
        return None
    if max(s.peak_bytes for s in others) >= min(s.peak_bytes for s in with_longest):
        return None
    shape = with_longest[0].largest_shape
    numbers = [str(step.number) for step in with_longest]
    shown = ", ".join(numbers[:3]) + (f" and {len(numbers) - 3} more" if len(numbers) > 3 else "")
    return Verdict(
        "longest batch",
        f"The longest batch holds the peak: it follows {shape}, step{'s' * (len(numbers) > 1)}"
        f" {shown}; the other steps need {format_bytes(max(s.peak_bytes for s in others))}.",
    )


def _steady(steps: Sequence[Step]) -> str:
    first, last = steps[0].number, steps[-1].number
    if len(steps) == 2:
        return f"Steady so far: step {last} leaves no more than step {first} did."
    return f"Steady: from step {max(first, 2)} to step {last} nothing grows."
