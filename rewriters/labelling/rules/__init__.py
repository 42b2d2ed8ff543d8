"""What each op does to channel labels: one file for each family of ops, one function for each rule."""

from rewriters.labelling.rules import (
    creation,
    elementwise,
    indexing,
    kernels,
    mixing,
    movement,
    opaque,
    recurrent,
    sampling,
    writing,
)
from rewriters.labelling.rules.registry import (
    RULES,
    DeferredMerge,
    Findings,
    KernelCall,
    LabelledStatistic,
    OpCall,
    Rule,
    find_rule,
    rule,
)

PRODUCTS = (kernels.convolution, kernels.matmul, kernels.addmm, sampling.deform_conv2d)
"""The rules of ops that sum over channels with a kernel."""

__all__ = [
    "PRODUCTS",
    "RULES",
    "DeferredMerge",
    "Findings",
    "KernelCall",
    "LabelledStatistic",
    "OpCall",
    "Rule",
    "creation",
    "elementwise",
    "find_rule",
    "indexing",
    "kernels",
    "mixing",
    "movement",
    "opaque",
    "recurrent",
    "rule",
    "sampling",
    "writing",
]
