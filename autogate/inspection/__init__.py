"""Tables about a model: what is left under gates, what could be removed, how long it takes."""

from autogate.inspection.adaptive_summary import AdaptiveLayer, AdaptiveSummary, summarise_adaptive
from autogate.inspection.comparison import (
    Comparison,
    Duration,
    SubnetTimes,
    compare,
    compare_onnx,
    time_in_turns,
    time_subnets,
)
from autogate.inspection.coupling_graph import check_drawable, counted, draw_coupling_graph, shortened
from autogate.inspection.model_inspection import Inspection, Stage, inspect_model
from autogate.inspection.printing import short
from autogate.inspection.summary import Summary, summarise, summarise_slim

__all__ = [
    "AdaptiveLayer",
    "AdaptiveSummary",
    "Comparison",
    "Duration",
    "Inspection",
    "Stage",
    "SubnetTimes",
    "Summary",
    "check_drawable",
    "compare",
    "compare_onnx",
    "counted",
    "draw_coupling_graph",
    "inspect_model",
    "short",
    "shortened",
    "summarise",
    "summarise_adaptive",
    "summarise_slim",
    "time_in_turns",
    "time_subnets",
]
