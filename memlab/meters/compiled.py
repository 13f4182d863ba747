"""Optimizer steps that were compiled: `torch.compile(optimizer.step)`.

While a compiled step runs, the optimizer's hooks do not. But the compiler reads them, once for each
compilation, and the profiler names each run of what was compiled. So the first run that begins
after the hook was read is that of a step, and so is every run of the same name.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch

from memlab.ledger import Span, Spans

#: How PyTorch's profiler names a run of compiled code; which code it is follows.
_REGION = "Torch-Compiled Region"

_read: list[int] = []


@torch.compiler.assume_constant_result
def note_read() -> int:
    """Note the moment at which the compiler reads the hook that calls this: then, it is run."""
    _read.append(time.time_ns())
    return 0


def moments_read(since: int) -> list[int]:
    """The moments (nanoseconds) from `since` on at which an optimizer's hook was compiled."""
    _read[:] = [moment for moment in _read if moment >= since]
    return list(_read)


def add_compiled_steps(spans: Sequence[Span], read: Iterable[int]) -> list[Span]:
    """Add the optimizer's steps that were compiled, without the modules that they are made of.

    Args:
        spans: what ran.
        read: the moments (nanoseconds) at which the compiler read an optimizer's hook.

    Returns:
        The spans, with one of kind "optimizer" for each compiled step.
    """
    regions = Spans(s for s in spans if s.kind == "operator" and s.name.startswith(_REGION))
    hooked = [span.start for span in spans if span.kind == "optimizer"]
    begun: dict[Span, int] = {}
    for moment in read:
        number = regions.begun(moment)
        if number == len(regions):
            continue
        region = regions[number]
        # A hook that ran after all: the compiler had given up.
        if not any(moment <= start < region.start for start in hooked):
            begun[region] = min(moment, begun.get(region, moment))

    # While something is compiled, forward and backward are tried out.
    compiling = Spans(s for s in spans if s.kind == "operator" and "dynamo" in s.name)
    training = Spans(s for s in spans if _trains(s) and not compiling.at(s.start))
    names = {region.name for region in begun}
    steps = []
    for region in regions:
        if region.name in names and not training.inside(region):
            # The first run belongs to the compilation, which makes the optimizer's state.
            steps.append(Span(begun.get(region, region.start), region.end, "optimizer", "compiled"))
    of_steps = Spans(steps)
    return [s for s in spans if s.kind != "module" or not of_steps.at(s.start)] + steps


def _trains(span: Span) -> bool:
    """Whether it is of a forward with gradients or of a backward: no optimizer does that."""
    return span.kind == "backward" or (span.kind == "operator" and span.sequence >= 0)
