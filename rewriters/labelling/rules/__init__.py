"""What each family of ops does to channel labels: one file a family, one function a rule."""

from rewriters.labelling.rules import (
    creation,
    elementwise,
    kernels,
    mixing,
    movement,
    picking,
    recurrent,
    sampling,
    unrecorded,
    writing,
)
from rewriters.labelling.rules.registry import (
    RULES,
    Crossing,
    Findings,
    KernelCall,
    Look,
    OpCall,
    Rule,
    find_rule,
    rule,
)

PRODUCTS = (kernels.convolution, kernels.matmul, kernels.addmm, sampling.deform_conv2d)
"""Rules of ops that sum over channels with a kernel."""

__all__ = [
    "PRODUCTS",
    "RULES",
    "Crossing",
    "Findings",
    "KernelCall",
    "Look",
    "OpCall",
    "Rule",
    "creation",
    "elementwise",
    "find_rule",
    "kernels",
    "mixing",
    "movement",
    "picking",
    "recurrent",
    "rule",
    "sampling",
    "unrecorded",
    "writing",
]
