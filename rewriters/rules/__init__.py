"""What each family of ops does to channel labels: one file a family, one function a rule."""

from rewriters.rules import creation, elementwise, kernels, mixing, movement, picking, recurrent, unrecorded
from rewriters.rules.registry import RULES, Crossing, Findings, KernelCall, Look, OpCall, Rule, find_rule, rule

__all__ = [
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
    "unrecorded",
]
