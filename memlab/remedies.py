"""What would take bytes away from a peak: which technique, and at most how many by its definition.

No estimate of what will be left: that depends on what becomes the peak then. Measure again.
"""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from memlab.holders import Holder, find_holders
from memlab.ledger import Block
from memlab.measurement import Measurement
from memlab.meters.refusals import OverBudget
from memlab.receipt import groups
from memlab.units import format_bytes

#: What a loss over a vocabulary is made of.
_LOSS = re.compile(r"log_softmax|nll_loss|cross_entropy", re.IGNORECASE)

#: A module in a list: what the list is called, and its number in it.
_IN_A_LIST = re.compile(r"^(.*?\b)(\d+)(?=\.|$)")


class Remedy(NamedTuple):
    """A technique, the column it takes from, and the bytes that it can take at most."""

    bytes: int
    column: str
    says: str

    def __str__(self) -> str:
        return f"up to {format_bytes(self.bytes)} of {self.column.replace('_', ' ')}: {self.says}"


def remedies(measurement: Measurement) -> list[Remedy]:
    """What would take bytes away from a measured peak, the most first.

    Args:
        measurement: what was measured.

    Returns:
        The techniques that have something to take at the peak.
    """
    ledger = measurement.ledger
    alive = ledger.alive_at(ledger.peak_time)
    at_peak: dict[str, list[Block]] = {column: [] for column in measurement.columns}
    for block in alive:
        at_peak[block.column].append(block)

    found = [
        _checkpointing(at_peak["activations"]),
        _two_micro_batches(at_peak["activations"]),
        _fused_loss(at_peak["activations"], at_peak["temporaries"]),
        _fused_optimizer(at_peak["temporaries"]),
        _in_backward(at_peak["gradients"]),
        Remedy(
            _sum(_in_32_bits(at_peak["activations"])) // 2,
            "activations",
            "mixed precision, for what is FP32 (techniques/mixed_precision.py)",
        ),
        Remedy(
            _sum(_in_32_bits(at_peak["optimizer_state"])) * 3 // 4,
            "optimizer_state",
            "AdamW with its moments in 8 bits (techniques/lean_optimizers.py)",
        ),
        Remedy(
            _sum(_in_32_bits(at_peak["parameters"])) // 2,
            "parameters",
            "16-bit weights (techniques/low_precision.py)",
        ),
        Remedy(
            _sum(at_peak["kept"]),
            "kept",
            "letting go of it, or keeping numbers (`loss.item()`) and copies on the CPU",
        ),
        Remedy(
            _sum(at_peak["batch"]),
            "batch",
            "data that is streamed, not kept on the device (techniques/data_loading.py)",
        ),
    ]
    return sorted((remedy for remedy in found if remedy.bytes), reverse=True)


def _sum(blocks: Sequence[Block]) -> int:
    return sum(block.bytes for block in blocks)


def _in_32_bits(blocks: Sequence[Block]) -> list[Block]:
    """Those in 32 bits, and those whose type was not seen."""
    return [block for block in blocks if block.dtype in ("float32", None)]


def _checkpointing(activations: Sequence[Block]) -> Remedy:
    """All that a list of modules keeps, but what one of them does: that one is recomputed whole."""
    lists: dict[str, dict[str, int]] = {}
    for block in activations:
        place = _IN_A_LIST.match(block.module)
        if place:
            of_list = lists.setdefault(place[1], {})
            of_list[place[2]] = of_list.get(place[2], 0) + block.bytes
    saved = {name: sum(kept.values()) - max(kept.values()) for name, kept in lists.items()}
    name = max(saved, key=saved.get, default="")
    return Remedy(
        saved.get(name, 0),
        "activations",
        f"gradient checkpointing of the {len(lists.get(name, ()))} modules in"
        f" {name.rstrip('.') or 'the model'} (techniques/gradient_checkpointing.py)",
    )


def _two_micro_batches(activations: Sequence[Block]) -> Remedy:
    return Remedy(
        _sum(activations) // 2,
        "activations",
        "two micro-batches in place of one batch (techniques/gradient_accumulation.py)",
    )


def _fused_loss(activations: Sequence[Block], temporaries: Sequence[Block]) -> Remedy:
    """The logits' log-softmax, kept for the backward or at work in it."""
    of_loss = [b for b in (*activations, *temporaries) if _LOSS.search(b.operator)]
    column = "temporaries" if of_loss and of_loss[0] in temporaries else "activations"
    says = "a loss that is computed a piece at a time (techniques/compilation_and_fusion.py)"
    return Remedy(_sum(of_loss), column, says)


def _fused_optimizer(temporaries: Sequence[Block]) -> Remedy:
    of_optimizer = [block for block in temporaries if block.phase == "optimizer"]
    return Remedy(_sum(of_optimizer), "temporaries", "the optimizer with `fused=True`")


def _in_backward(gradients: Sequence[Block]) -> Remedy:
    """An optimizer that steps in backward holds one gradient at a time."""
    largest = max((block.bytes for block in gradients), default=0)
    return Remedy(
        _sum(gradients) - largest,
        "gradients",
        "an optimizer that steps in backward (techniques/gradient_accumulation.py)",
    )


def out_of_memory(measurement: Measurement, error: BaseException | None = None) -> list[str]:
    """Why a run did not fit, in lines: the column, its blocks, the line, and what to do.

    Args:
        measurement: what was measured until then.
        error: what was raised (None: the ledger found it afterwards).

    Returns:
        The lines.
    """
    largest = max(measurement.columns, key=measurement.columns.get)
    size = format_bytes(measurement.columns[largest])
    alive = measurement.ledger.alive_at(measurement.ledger.peak_time)
    lines = []
    if isinstance(error, OverBudget) and measurement.peak_bytes > error.limit and error.asked:
        lines.append(
            f"The peak is over the budget of {format_bytes(error.limit)}: it counts also the"
            f" {format_bytes(error.asked)} that were asked for and refused."
        )
    lines.append(f"The largest column at the peak is {largest.replace('_', ' ')}, {size}:")
    for group in groups(block for block in alive if block.column == largest)[:3]:
        lines.append(f"  {group}, {group.place or 'from before'}")
    lines += [f"  held by {holder}" for holder in _holders(measurement, largest)]
    line = "" if error is None else line_of(error)
    if line:
        lines.append(f"It ran out at {line}")
    lines.append("What would take bytes away (each at most, from this peak):")
    worth = [each for each in remedies(measurement) if each.bytes * 100 >= measurement.peak_bytes]
    lines += [f"  {remedy}" for remedy in worth[:4]]
    return lines


def _holders(measurement: Measurement, column: str) -> list[Holder]:
    """Who holds the largest blocks of a column that are still alive."""
    alive = measurement.ledger.alive_at(measurement.ledger.peak_time)
    held = [block.address for block in alive if block.column == column and block.died is None]
    found = find_holders(held[:8], device=measurement.environment["device"])
    if column == "activations":
        # That a graph and the frames of a forward hold them says nothing: they are made for that.
        found = [holder for holder in found if holder.kind not in ("graph", "traceback")]
    return found[:2]


def line_of(error: BaseException) -> str:
    """The innermost line of the user's code that an error came from, as `train.py:41: f(x)`.

    Args:
        error: what was raised.

    Returns:
        The line, or nothing where all of them are in libraries.
    """
    libraries = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib"))
    here = str(Path(__file__).parent)
    # A budget's error was caused by that of the device, which knows the line.
    for raised in (error, error.__cause__):
        frames = traceback.extract_tb(None if raised is None else raised.__traceback__)
        for frame in reversed(frames):
            if not frame.filename.startswith((*libraries, here, "<")):
                return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return ""
