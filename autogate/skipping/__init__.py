"""Models that skip what their saliency modules switch off. In: a trained model. Out: the same model, faster."""

from autogate.skipping.break_even import BreakEven
from autogate.skipping.finalizing import finalize_adaptive, forwards_in, set_budget
from autogate.skipping.forwards import SkippingForward
from autogate.skipping.grouping import Grouping, grouping_of

__all__ = [
    "BreakEven",
    "Grouping",
    "SkippingForward",
    "finalize_adaptive",
    "forwards_in",
    "grouping_of",
    "set_budget",
]
