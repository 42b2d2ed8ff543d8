"""What shall be left: in come shares (half of the FLOPs), out come `Targets` that price every class of channels."""

from autogate.budget.products import Flops, Params
from autogate.budget.resource import Resource, SideCounts
from autogate.budget.targets import ROUNDING, ResourceMaker, Shares, Target, Targets

__all__ = [
    "ROUNDING",
    "Flops",
    "Params",
    "Resource",
    "ResourceMaker",
    "Shares",
    "SideCounts",
    "Target",
    "Targets",
]
