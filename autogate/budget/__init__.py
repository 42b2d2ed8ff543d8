"""What is to be left of a model. `Shares` (half of the FLOPs) become `Targets`, which price every class of channels."""

from autogate.budget.products import Activations, Flops, Params
from autogate.budget.resource import Resource, SideCounts
from autogate.budget.targets import ROUNDING, ResourceMaker, Shares, Target, Targets
from autogate.budget.timing import machine, time_model, timer

__all__ = [
    "ROUNDING",
    "Activations",
    "Flops",
    "Params",
    "Resource",
    "ResourceMaker",
    "Shares",
    "SideCounts",
    "Target",
    "Targets",
    "machine",
    "time_model",
    "timer",
]
