"""memlab: fit more model into the GPU memory you have. Predict, measure, explain.

from memlab import compare, measure
print(compare(measure(before), measure(after)))
"""

from memlab.budget import budget
from memlab.compare import Comparison, compare
from memlab.ledger import COLUMNS
from memlab.measure import Measurement, MemoryLeakError, measure, watch
from memlab.units import format_bytes, parse_bytes

__version__ = "0.1.0"

__all__ = [
    "COLUMNS",
    "Comparison",
    "Measurement",
    "MemoryLeakError",
    "budget",
    "compare",
    "format_bytes",
    "measure",
    "parse_bytes",
    "watch",
]
