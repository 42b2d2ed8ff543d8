"""Trace a module's own forward and rewrite it for fewer channels: in comes a module, out comes a new `forward`."""

from rewriters.forwards.label_mask import LabelMask
from rewriters.forwards.multi_head_attention import keep_layers_apart
from rewriters.forwards.resizing import Unwritable, sweep
from rewriters.forwards.rewritten_forward import (
    InterpretedForward,
    LiveForward,
    RewrittenForward,
    bind_arguments,
    given_to,
    out_of_place,
)
from rewriters.forwards.traced import Traced, by_mode, trace_modes
from rewriters.forwards.tracer_patches import patches_held

__all__ = [
    "InterpretedForward",
    "LabelMask",
    "LiveForward",
    "RewrittenForward",
    "Traced",
    "Unwritable",
    "bind_arguments",
    "by_mode",
    "given_to",
    "keep_layers_apart",
    "out_of_place",
    "patches_held",
    "sweep",
    "trace_modes",
]
