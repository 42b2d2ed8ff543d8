"""Models that skip what their saliency modules switch off. In: a trained model. Out: the same model, faster."""

from autogate.skipping.break_even import BreakEven
from autogate.skipping.finalizing import finalize_adaptive, forwards_in, set_budget
from autogate.skipping.forwards import SkippingForward
from autogate.skipping.grouping import Grouping, grouping_of
from autogate.skipping.record import Skipping, record_of_skipping, skip_again

__all__ = [
    "BreakEven",
    "Grouping",
    "Skipping",
    "SkippingForward",
    "finalize_adaptive",
    "forwards_in",
    "grouping_of",
    "record_of_skipping",
    "set_budget",
    "skip_again",
]
