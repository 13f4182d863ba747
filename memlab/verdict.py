"""What a run's steps say, in one sentence: steady, growing, or as large as the longest batch."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from memlab.growth import LEAST_GROWTH, Growth, changes_of, host_growth
from memlab.holders import Holder
from memlab.ledger import Step, numbers_in
from memlab.units import format_bytes


@dataclass(frozen=True)
class Verdict:
    """What the steps say.

    Attributes:
        kind: "steady", "creep", "creep ended", "longest batch", "building" or "unknown".
        sentence: the same for people.
        bytes_a_step: by how much a step makes it grow; 0 where nothing grows.
        column, operator, module, holder, line: of what grows, where it is known.
    """

    kind: str
    sentence: str
    bytes_a_step: int = 0
    column: str = ""
    operator: str = ""
    module: str = ""
    holder: str = ""
    line: str = ""


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
    changes = changes_of(full)
    if len(changes) > 1 and changes[-1] < 0:
        # The loop's function has returned, and what it held is gone.
        changes, whole = changes[:-1], full[:-1]
    else:
        whole = full
    if _creeps(whole, changes, growth):
        return _creep(whole, changes, growth, holders)
    if building_peak is not None and building_peak > max(step.peak_bytes for step in full):
        return _building(full, building_peak)
    if _ended_growing(changes):
        return _ended(whole, changes)
    if host := host_growth(steps):
        words = f"Steady on the device, and the host's heap grows by {format_bytes(host)} a step"
        return Verdict("steady", f"{words}{_held_by(holders)}.")
    return _longest(full) or Verdict("steady", _steady(full))


def with_peak(verdict: Verdict, steps: Sequence[Step], peak_bytes: int, moment: int) -> Verdict:
    """Say where the peak is, if it is in none of the steps, or in the first one alone.

    Args:
        verdict: what the steps say.
        steps: all steps of the run.
        peak_bytes: the run's peak.
        moment: when that was (nanoseconds).
    """
    of_steps = [step.peak_bytes for step in steps if step.peak_bytes is not None]
    if verdict.kind == "steady" and len(of_steps) > 2 and steps[0].peak_bytes == of_steps[0]:
        others = max(of_steps[1:])
        if of_steps[0] >= max(peak_bytes, others + LEAST_GROWTH):
            # A model that was tried out with a backward of its own, for one.
            words = f" The peak is that of step 1 alone; the others need {format_bytes(others)}."
            return dataclasses.replace(verdict, sentence=verdict.sentence + words)
    known = verdict.kind in ("building", "unknown")
    inside = any(step.start <= moment < step.end for step in steps)
    if known or inside or not of_steps or peak_bytes <= max(of_steps):
        return verdict
    before = [step.number for step in steps if step.end <= moment]
    where = "before the first step"
    if before:
        where = f"after step {before[-1]}, in a step that did not end or in what follows the steps"
    words = f" The peak, {format_bytes(peak_bytes)}, came {where}."
    return dataclasses.replace(verdict, sentence=verdict.sentence + words)


def _creeps(steps: Sequence[Step], changes: Sequence[int], growth: Sequence[Growth]) -> bool:
    """Whether it goes on growing: it grew in several steps, for the most part stayed so, and still
    grew near the end.
    """
    grown = [index for index, change in enumerate(changes) if change >= LEAST_GROWTH]
    if len(changes) == 1:
        # A single change may be a loop's variable that is set anew, or a loader a batch ahead.
        return bool(grown and growth) and _column_that_grew(steps) != "batch"
    left = [step.bytes_left for step in steps[-len(changes) - 1 :]]
    risen = sum(max(0, after - before) for before, after in zip(left, left[1:], strict=False))
    stayed = left[-1] - left[0] >= risen / 2
    near_the_end = min(len(changes) - 2, 2 * len(changes) // 3)
    # One large change among small ones is something that was kept once, such as the best weights.
    sizes = sorted(changes[index] for index in grown)
    again = len(grown) > 2 or len(grown) == 2 and sizes[0] >= sizes[1] / 2
    return again and stayed and grown[-1] >= near_the_end


def _ended_growing(changes: Sequence[int]) -> bool:
    """Whether it grew, never shrank, and came to rest."""
    # (After the last step a loop's variables may be gone.)
    grew = any(change >= LEAST_GROWTH for change in changes)
    shrank = any(change <= -LEAST_GROWTH for change in changes[:-1])
    return grew and not shrank and len(changes) > 2 and max(changes[-2:]) < LEAST_GROWTH


def _creep(
    steps: Sequence[Step],
    changes: Sequence[int],
    growth: Sequence[Growth],
    holders: Sequence[Holder],
) -> Verdict:
    grown = [change for change in changes if change >= LEAST_GROWTH]
    size, often = round(statistics.median(grown)), "a step"
    if len(grown) < len(changes) / 2:
        size, often = round(sum(changes) / len(changes)), "a step on average"
    column = _column_that_grew(steps)
    largest = growth[0] if growth and column == "kept" else Growth(column, "", "", size)

    words = f"It grows by {format_bytes(size)} {often} ({size:,} bytes): {column.replace('_', ' ')}"
    if largest.place:
        made = "" if largest.column == column else f" {largest.column.replace('_', ' ')}"
        words += f",{made} made by {largest.place}"
    words += _held_by(holders)
    if column == "kept" and not holders:
        words += ". Who holds it was not seen"
        words += "" if largest.line else ". The line that made it: --lines, or lines=True"
    if len(changes) == 1:
        words += f". {len(steps)} steps cannot tell whether that goes on: measure more"
    holder = holders[0].path if holders else ""
    made_by = largest.operator, largest.module, holder, largest.line
    return Verdict("creep", words + ".", size, column, *made_by)


def _column_that_grew(steps: Sequence[Step]) -> str:
    first = 1 if len(steps) > 2 else 0
    before = steps[first].columns_after
    # Where it is highest: when the loop's function returns, what it held goes with the last step.
    last = max(steps[first:], key=lambda step: step.bytes_left).columns_after
    return max(last, key=lambda name: last[name] - before[name])


def _held_by(holders: Sequence[Holder]) -> str:
    if not holders:
        return ""
    path = holders[0].path
    of_graph = (
        holder.frees for holder in holders if holder.kind == "graph" and path in holder.path
    )
    advice = next(of_graph, holders[0].frees)
    return f", held by {path}" + (f" ({advice})" if advice else "")


def _ended(steps: Sequence[Step], changes: Sequence[int]) -> Verdict:
    last = max(index for index, change in enumerate(changes) if change >= LEAST_GROWTH)
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
    # In the step after it, a loop's variables still hold what it made.
    after = {step.number + 1 for step in with_longest}
    others = [s for s in judged if sizes[s.number] < longest and s.number not in after]
    if not others or len(with_longest) > len(others):  # it is the usual one
        return None
    if max(s.peak_bytes for s in others) >= min(s.peak_bytes for s in with_longest):
        return None
    shape = with_longest[0].largest_shape
    numbers = [str(step.number) for step in with_longest]
    shown = ", ".join(numbers[:3]) + (f" and {len(numbers) - 3} more" if len(numbers) > 3 else "")
    return Verdict(
        "longest batch",
        f"The longest batch holds the peak: shape {shape}, step{'s' * (len(numbers) > 1)}"
        f" {shown}; the other steps need {format_bytes(max(s.peak_bytes for s in others))}.",
    )


def _steady(steps: Sequence[Step]) -> str:
    first, last = steps[0].number, steps[-1].number
    if len(steps) == 2:
        return f"Steady so far: step {last} leaves no more than step {first} did."
    return f"Steady: from step {max(first, 2)} to step {last} nothing grows."
