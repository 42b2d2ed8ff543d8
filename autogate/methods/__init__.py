"""What decides which channels die: in come readings of a step, out come gates."""

from autogate.methods.arguments import as_method, budget_of
from autogate.methods.clipped_lasso import ClippedLasso
from autogate.methods.gdp import GDP
from autogate.methods.learner import Learner, Standing
from autogate.methods.method import Gates, Grouping, KernelSums, Method, Proposal, Step
from autogate.methods.text import METHODS, method_of

__all__ = [
    "GDP",
    "METHODS",
    "ClippedLasso",
    "Gates",
    "Grouping",
    "KernelSums",
    "Learner",
    "Method",
    "Proposal",
    "Standing",
    "Step",
    "as_method",
    "budget_of",
    "method_of",
]
