"""autogate: learn which channels a model can do without, then make it physically smaller.

model = autogate.prepare(model, flops=0.5, steps=10_000)   # gates in: same object, same outputs
train(model)                                               # your own loop
slim = autogate.finalize(model)                            # plain layers, half the FLOPs, same outputs
"""

from autogate.api import BudgetNotMetWarning, finalize, gates, prepare, step, summary
from autogate.gates import GateBank
from autogate.recalibration import recalibrate
from autogate.resources import Resource, SideCounts
from autogate.summary import Summary
from rewriters import AutogateError, CaptureError, SurgeryError, VerificationError

__version__ = "0.1.0"

__all__ = [
    "AutogateError",
    "BudgetNotMetWarning",
    "CaptureError",
    "GateBank",
    "Resource",
    "SideCounts",
    "Summary",
    "SurgeryError",
    "VerificationError",
    "finalize",
    "gates",
    "prepare",
    "recalibrate",
    "step",
    "summary",
]
