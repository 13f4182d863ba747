"""What the ledger's tests make up: events, and two steps of training. Times are in nanoseconds; a
block is named by its address.
"""

from memlab.ledger import Block, Event, Ledger, Span, build_ledger


def alive(time: int, address: int, size: int, died: int | None = None) -> list[Event]:
    """A block's hand-out and, if it died, its return."""
    return [Event(time, address, size)] + (
        [Event(died, address, -size)] if died is not None else []
    )


def by_address(ledger: Ledger) -> dict[int, Block]:
    return {block.address: block for block in ledger.blocks}


def columns_of(events, observations=(), spans=(), **options) -> dict[int, str]:
    ledger, _ = build_ledger(
        sorted(e for block in events for e in block), observations, spans, **options
    )
    return {block.address: block.column for block in ledger.blocks}


# Two steps: forward 100-200 (loss until 300), backward 300-400, optimizer 450-500; then the same
# 1000 later.
TWO_STEPS = [
    span
    for begin in (0, 1000)
    for span in (
        Span(begin + 90, begin + 510, "step"),
        Span(begin + 100, begin + 200, "module", "model"),
        Span(begin + 120, begin + 150, "module", "model.inner"),
        Span(begin + 300, begin + 340, "backward", "B"),
        Span(begin + 345, begin + 400, "backward", "A"),
        Span(begin + 450, begin + 500, "optimizer", "SGD"),
    )
]
