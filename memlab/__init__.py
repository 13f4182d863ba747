"""memlab: fit more model into the GPU memory you have. Predict, measure, explain.

from memlab import compare, measure
print(compare(measure(before), measure(after)))
"""

from memlab.budget import budget
from memlab.compare import compare
from memlab.comparison import Comparison
from memlab.ledger import COLUMNS
from memlab.measure import measure
from memlab.measurement import Measurement
from memlab.meters.refusals import MemoryLeakError, OverBudget
from memlab.plan import Plan, plan
from memlab.predict import predict
from memlab.prediction import Fit, Prediction
from memlab.solve import Solution, solve
from memlab.units import format_bytes, parse_bytes
from memlab.watch import watch

__version__ = "0.1.0"

__all__ = [
    "COLUMNS",
    "Comparison",
    "Fit",
    "Measurement",
    "MemoryLeakError",
    "OverBudget",
    "Plan",
    "Prediction",
    "Solution",
    "budget",
    "compare",
    "format_bytes",
    "measure",
    "parse_bytes",
    "plan",
    "predict",
    "solve",
    "watch",
]
