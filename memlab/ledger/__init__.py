"""The ledger: which bytes were alive at which moment, and what each of them was for.

Plain data. A meter (`memlab.meters`) hands over three lists, and this room joins them:

- *events*: the allocator's own, one when a block of memory is handed out and one when it comes
  back;
- *observations*: "at this moment, this address held a parameter";
- *spans*: "from here to there a module ran forward", "... an operator ran", "... the optimizer
  stepped".

Nothing here imports torch, so every rule can be tested with a handful of made-up events.
"""

from memlab.ledger.backward import activations_at_backward
from memlab.ledger.blocks import COLUMNS, Block, Event, format_type, lives
from memlab.ledger.buckets import BUCKET
from memlab.ledger.labels import build_ledger
from memlab.ledger.ledger import Ledger, Timeline
from memlab.ledger.observations import FROM_LOADER, PRIORITY, Observation, rank_of
from memlab.ledger.phases import PHASES
from memlab.ledger.spans import Span, Spans
from memlab.ledger.steps import Counted, Shapes, Step, left_by, numbers_in, steps_in

__all__ = [
    "BUCKET",
    "COLUMNS",
    "FROM_LOADER",
    "PHASES",
    "PRIORITY",
    "Block",
    "Counted",
    "Event",
    "Ledger",
    "Observation",
    "Shapes",
    "Span",
    "Spans",
    "Step",
    "Timeline",
    "activations_at_backward",
    "build_ledger",
    "format_type",
    "left_by",
    "lives",
    "numbers_in",
    "rank_of",
    "steps_in",
]
