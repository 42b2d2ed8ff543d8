"""What decides which channels die: in come readings of a step, out come gates. GDP is the method there is."""

from autogate.methods.gdp import GDP
from autogate.methods.learner import Learner, Standing
from autogate.methods.method import Gates, KernelSums, Method, Proposal, Step

__all__ = [
    "GDP",
    "Gates",
    "KernelSums",
    "Learner",
    "Method",
    "Proposal",
    "Standing",
    "Step",
]
