"""Tables of a model: what is left, what could go, how long it takes."""

from autogate.inspection.comparison import Comparison, Duration, compare
from autogate.inspection.coupling import Inspection, Stage, draw, inspect_model
from autogate.inspection.summary import Summary, short, summarise

__all__ = [
    "Comparison",
    "Duration",
    "Inspection",
    "Stage",
    "Summary",
    "compare",
    "draw",
    "inspect_model",
    "short",
    "summarise",
]
