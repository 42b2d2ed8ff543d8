"""Models that skip what their saliency modules switch off. In: a trained model. Out: the same model, faster."""

from autogate.skipping.break_even import BreakEven
from autogate.skipping.finalizing import finalize_adaptive, forwards_in
from autogate.skipping.forwards import SkippingForward

__all__ = ["BreakEven", "SkippingForward", "finalize_adaptive", "forwards_in"]
