"""autogate: learn which channels a model can do without, then make the model physically smaller.

model = autogate.prepare(model, flops=0.5, steps=10_000)   # add gates: same object, same outputs
train(model)                                               # your own training loop
slim = autogate.finalize(model)                            # plain layers, half the FLOPs, same outputs
"""

from autogate import subnets
from autogate.api import BudgetNotMetWarning, CollapseWarning, finalize, gates, prepare, step, summary
from autogate.budget import Resource, SideCounts
from autogate.closing import close
from autogate.files import load, save, to_timm_text
from autogate.gating import GateBank
from autogate.inspection import Summary
from autogate.methods import GDP
from autogate.slim import recalibrate
from autogate.version import __version__
from rewriters import AutogateError, CaptureError, SurgeryError, VerificationError

__all__ = [
    "GDP",
    "AutogateError",
    "BudgetNotMetWarning",
    "CaptureError",
    "CollapseWarning",
    "GateBank",
    "Resource",
    "SideCounts",
    "Summary",
    "SurgeryError",
    "VerificationError",
    "__version__",
    "close",
    "finalize",
    "gates",
    "load",
    "prepare",
    "recalibrate",
    "save",
    "step",
    "subnets",
    "summary",
    "to_timm_text",
]
