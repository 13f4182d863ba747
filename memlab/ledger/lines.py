"""The line of the user's code that made each block."""

from __future__ import annotations

from collections.abc import Iterable

from memlab.ledger.blocks import Block
from memlab.ledger.scratch import is_operator
from memlab.ledger.spans import Span, Spans


def note_lines(blocks: Iterable[Block], spans: Spans) -> None:
    """Note in which line each block was made; nothing where no lines were noted.

    A block that is born in backward gets the line of the forward operator that is differentiated,
    and the word "backward"; what a recomputation makes there gets the line that is run again. Where
    neither is known, it gets the line that called backward.

    Args:
        blocks: the blocks, each with its birth.
        spans: what ran when; those of the kind "line" are the lines.
    """
    lines = spans.of("line")
    if not len(lines):
        return
    nodes = spans.of("backward")
    operators = spans.of("operator")
    outermost = Spans(span for span in operators if is_operator(span.name)).outermost()

    # An operator carries the number that the next node will get. So what made a node is the last
    # operator with its number.
    line_of: dict[int, str] = {}
    for span in operators:
        if span.sequence >= 0 and nodes.at(span.start) is None:
            if (line := lines.at(_middle(span))) is not None:
                line_of[span.sequence] = line.name

    for block in blocks:
        node = nodes.at(block.born)
        operator = outermost.at(block.born)
        if operator is None or (node is not None and operator.start < node.start):
            operator = Span(block.born, block.born, "operator")
        # Python's clock and the allocator's differ by a little: not so much as to miss the middle.
        line = lines.at(_middle(operator))
        block.line = line.name if line is not None else ""
        # A line inside backward is one that is run again: a recomputation.
        is_again = node is not None and line is not None and line.start >= node.start
        if node is not None and not is_again and node.sequence in line_of:
            block.line = f"{line_of[node.sequence]} (backward)"


def _middle(span: Span) -> int:
    return (span.start + span.end) // 2
