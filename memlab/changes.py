"""What changed from one measurement to another, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable

from memlab.ledger import COLUMNS, format_type
from memlab.measurement import Measurement
from memlab.units import format_bytes

#: An operator's scratch, apart from the column that it is counted in.
_SCRATCH = "what operators take for themselves"

#: The places of what this device's allocator did not hand out.
_SHARED, _FILES, _HOST = "shared memory", "memory maps", "NumPy's arrays or other threads"

#: Those that take up memory as the allocator does.
_MEMORY = (_SHARED, _HOST)

#: A change of so small a part of the peak is not worth a word.
_WORTH_A_WORD = 0.01


def change_in_words(first: Measurement, last: Measurement) -> str:
    """Say by how much the peak changed, in which column, what a forward leaves for its backward,
    and what moved to where it is not counted. Where nothing changed, say what was seen of the run.

    Args:
        first: the baseline.
        last: where the techniques led.
    """
    difference = last.peak_bytes - first.peak_bytes
    moved = _moved_outside(first, last)
    words = [_cause(first, last)] if difference else []
    words += _activations(first, last, words)
    words += moved.values()
    if last.phase != first.phase:
        words.append(f"the peak is now in {last.phase}")
    sentence = f"Peak unchanged at {format_bytes(first.peak_bytes)}"
    if difference:
        sentence = _peaks(first, last)
    if words:
        sentence += ": " + ", ".join(words)
    seen = _seen(last)
    if seen and not moved and _is_the_same(first, last):
        every = "and every column" if not difference else "and the same tensors in every column"
        sentence += f", {every}. Is the switch on? {seen}"
    return sentence


def went_elsewhere(first: Measurement, last: Measurement) -> bool:
    """Whether what is missing at the last peak lies elsewhere in the same memory, in that of a data
    loader's workers or of NumPy: then it is wrong to call it so many times less.
    """
    less = last.peak_bytes < first.peak_bytes
    grown = _grown_outside(first, last)
    return less and any(_matters(grown[place], first) and grown[place] > 0 for place in _MEMORY)


def _peaks(first: Measurement, last: Measurement) -> str:
    peaks = f"Peak {format_bytes(first.peak_bytes)} → {format_bytes(last.peak_bytes)}"
    less = last.peak_bytes < first.peak_bytes
    if went_elsewhere(first, last):
        together = [m.peak_bytes + m.outside_bytes for m in (first, last)]
        return f"{peaks} ({' → '.join(map(format_bytes, together))} with what is outside)"
    smaller, larger = sorted((first.peak_bytes, last.peak_bytes))
    factor = larger / smaller
    times = f"{factor:.2f}×" if factor >= 1.005 else format_bytes(larger - smaller)
    return f"{peaks} ({times} {'less' if less else 'more'})"


def _cause(first: Measurement, last: Measurement) -> str:
    """The column that went farthest the way of the peak; there is one, since the columns add up to
    it. Where that is scratch, also the column of tensors that did.
    """
    fell = last.peak_bytes < first.peak_bytes
    farthest = min if fell else max
    before, after = _apart(first), _apart(last)
    change = {name: after[name] - before[name] for name in before}
    name = farthest(change, key=change.get)
    words = _signed(name, change.pop(name))
    if name == _SCRATCH:
        name = farthest(change, key=change.get)
        if (change[name] < 0) == fell and _matters(change[name], first):
            words += f", {_signed(name, change[name])}"
    return words


def _apart(measurement: Measurement) -> dict[str, int]:
    """The columns at the peak, with the scratch of operators apart."""
    ledger = measurement.ledger
    columns = {name: measurement.columns[name] for name in COLUMNS} | {_SCRATCH: 0}
    for block in ledger.alive_at(ledger.peak_time):
        if block.scratch:
            columns[block.column] -= block.bytes
            columns[_SCRATCH] += block.bytes
    return columns


def _activations(first: Measurement, last: Measurement, said: Iterable[str]) -> list[str]:
    """What a forward leaves for its backward, where the column at the peak does not say it."""
    before, after = first.activations_at_backward, last.activations_at_backward
    if before is None or after is None:
        return []
    if any(words.startswith("activations") for words in said):
        return []
    change = after - before
    # Layers that are frozen take gradients and work off backward, and may keep all that a forward
    # leaves: so it is said there, however little it is.
    hides_it = any(words.startswith(("gradients", "temporaries", _SCRATCH)) for words in said)
    if not hides_it and not _matters(change, first):
        return []
    name = "activations when backward begins"
    return [_signed(name, change) if change else f"{name} unchanged"]


def _moved_outside(first: Measurement, last: Measurement) -> dict[str, str]:
    """What this device's allocator handed out in one run and not in the other, by place."""
    words = {}
    for place, change in _grown_outside(first, last).items():
        if _matters(change, first):
            verb = "went to" if change > 0 else "came back from"
            words[place] = f"{format_bytes(abs(change))} {verb} {place}"
    return words


def _grown_outside(first: Measurement, last: Measurement) -> dict[str, int]:
    before, after = _outside(first), _outside(last)
    return {place: after[place] - before[place] for place in before}


def _outside(measurement: Measurement) -> dict[str, int]:
    shared, host = measurement.outside_shared_bytes, measurement.outside_memory_bytes
    return {_SHARED: shared, _FILES: measurement.outside_bytes - shared - host, _HOST: host}


def _is_the_same(first: Measurement, last: Measurement) -> bool:
    def compared(measurement: Measurement) -> tuple:
        return measurement.known_columns, measurement.activations_at_backward

    return compared(first) == compared(last)


def _seen(measurement: Measurement) -> str:
    """What tells whether a technique was at work."""
    ledger = measurement.ledger
    if not ledger.blocks:
        return ""
    blocks = _blocks(ledger.modules)
    recomputed = blocks & _blocks(f"{name}." for name in ledger.recomputed)
    if blocks:
        seen = [f"{len(recomputed)} of {len(blocks)} blocks were recomputed in backward"]
    else:
        seen = [f"{ledger.recomputations or 'nothing'} was recomputed in backward"]
    types = {block.dtype for block in ledger.blocks if _is_floating(block.dtype)}
    if types:
        names = " and ".join(sorted(map(format_type, types)))
        seen.append(f"the tensors seen were in {names}")
    if measurement.evaluating:
        seen.append("the model was in eval() mode")
    if measurement.never_called:
        names = ", ".join(measurement.never_called[:3])
        more = len(measurement.never_called) - 3
        names += f" and {more} more" if more > 0 else ""
        seen.append(f"what was applied to {names} was never called")
    sentence = ", ".join(seen)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _blocks(modules: Iterable[str]) -> set[str]:
    """The modules that have a number and modules of their own: `h.0`, since there is `h.0.mlp`."""
    found = (re.match(r"(?:.*?\.)??\d+(?=\.)", name) for name in modules)
    return {match.group() for match in found if match}


def _is_floating(dtype: str | None) -> bool:
    return dtype is not None and dtype.startswith(("float", "bfloat"))


def _matters(change: int, first: Measurement) -> bool:
    return abs(change) >= _WORTH_A_WORD * first.peak_bytes


def _signed(name: str, change: int) -> str:
    sign = "−" if change < 0 else "+"
    return f"{name.replace('_', ' ')} {sign}{format_bytes(abs(change))}"
