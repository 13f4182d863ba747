"""What ran when, and the questions that one asks of many such spans."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

#: Later than every moment of a run.
FOREVER = 2**63 - 1


class Span(NamedTuple):
    """Something ran from `start` to `end` (nanoseconds).

    `kind` is `"module"`, `"operator"`, `"backward"` (autograd evaluating one node), `"optimizer"`,
    `"step"` or `"reducer"` (where `DistributedDataParallel` may make its buckets). `sequence` is
    autograd's number of the forward operator, which its backward node carries too (-1: none). For a
    module it is 0 if it ran with gradients enabled, else -1.
    """

    start: int
    end: int
    kind: str
    name: str = ""
    thread: int = 0
    sequence: int = -1


class Spans:
    """Spans in order of time; of two that begin together, the longer one first.

    Args:
        spans: in any order. They may lie in each other, as calls do.
    """

    def __init__(self, spans: Iterable[Span] = ()):
        self._spans = sorted(spans, key=lambda span: (span.start, -span.end))

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Span:
        return self._spans[index]

    def of(self, *kinds: str) -> Spans:
        """Those of some kinds."""
        return Spans(span for span in self if span.kind in kinds)

    def at(self, time: int) -> Span | None:
        """The innermost span that holds a moment (its end is no part of it), or None."""
        moments, innermost = self._stretches
        index = bisect.bisect_right(moments, time) - 1
        return innermost[index] if index >= 0 else None

    def inside(self, outer: Span) -> list[Span]:
        """Those that begin while `outer` runs."""
        first = bisect.bisect_left(self._starts, outer.start)
        return self._spans[first : bisect.bisect_left(self._starts, outer.end)]

    def begun(self, time: int) -> int:
        """How many have begun by a moment."""
        return bisect.bisect_right(self._starts, time)

    def outermost(self) -> Spans:
        """Those that lie in no other one."""
        kept: list[Span] = []
        for span in self:
            if not kept or span.start >= kept[-1].end:
                kept.append(span)
        return Spans(kept)

    @cached_property
    def _starts(self) -> list[int]:
        return [span.start for span in self]

    @cached_property
    def _stretches(self) -> tuple[list[int], list[Span | None]]:
        """The moments at which the innermost span changes, and which one it is from each on."""
        moments: list[int] = []
        innermost: list[Span | None] = []
        running: list[Span] = []

        def end_until(time: int) -> None:
            while running and running[-1].end <= time:
                ended = running.pop().end
                while running and running[-1].end <= ended:
                    running.pop()
                moments.append(ended)
                innermost.append(running[-1] if running else None)

        for span in self:
            end_until(span.start)
            running.append(span)
            moments.append(span.start)
            innermost.append(span)
        end_until(FOREVER)
        return moments, innermost
