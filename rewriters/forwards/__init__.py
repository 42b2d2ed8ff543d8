"""Trace a module's own forward and rewrite it for fewer channels. In: a module and its call. Out: a new `forward`."""

from rewriters.forwards.cases import NOT_TOLD_APART, told_apart
from rewriters.forwards.copies import set_forward
from rewriters.forwards.fused_layers import disable_fused_layers
from rewriters.forwards.guards import GUARDS, ShapeGuardError, guard
from rewriters.forwards.label_mask import LabelMask, labelled_dims
from rewriters.forwards.moves import only_moves
from rewriters.forwards.recorded_code import code_as_graph, is_right
from rewriters.forwards.resizing import CannotResizeError, call_name, sweep
from rewriters.forwards.rewritten_forward import (
    Graphs,
    InterpretedForward,
    LiveForward,
    RewrittenForward,
    bind_arguments,
    out_of_place,
    placeholder_values,
)
from rewriters.forwards.traced_forward import TracedForward, graphs_by_mode, trace_modes
from rewriters.forwards.tracer_patches import patches_held

__all__ = [
    "GUARDS",
    "NOT_TOLD_APART",
    "CannotResizeError",
    "Graphs",
    "InterpretedForward",
    "LabelMask",
    "LiveForward",
    "RewrittenForward",
    "ShapeGuardError",
    "TracedForward",
    "bind_arguments",
    "call_name",
    "code_as_graph",
    "disable_fused_layers",
    "graphs_by_mode",
    "guard",
    "is_right",
    "labelled_dims",
    "only_moves",
    "out_of_place",
    "patches_held",
    "placeholder_values",
    "set_forward",
    "sweep",
    "told_apart",
    "trace_modes",
]
