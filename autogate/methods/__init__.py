"""What decides which channels die: in come readings of a step, out come gates. GDP is the method there is."""

from autogate.methods.gate_function import gate_value
from autogate.methods.learner import Gates, Learner, Standing

__all__ = [
    "Gates",
    "Learner",
    "Standing",
    "gate_value",
]
