"""From dead classes to the slim model: slimmed, verified, and recorded in a `History`."""

from autogate.slim.finalizing import (
    PrepareRecord,
    check_finite,
    check_not_sharded,
    slim_unverified,
    slim_verified,
    verify,
)
from autogate.slim.history import (
    ATTRIBUTE,
    History,
    Slimming,
    describe_buffers,
    describe_modules,
    describe_tensors,
    dtype_of,
    history_of,
    kept_by_side,
    read_inputs,
    slimming_from_json,
    slimming_to_json,
)
from autogate.slim.optimizer_state import as_optimizers, parameter_replacements, replace_parameters
from autogate.slim.recalibration import recalibrate
from autogate.slim.record_replay import (
    AnalysisOptions,
    add_shortcut_convolutions,
    analyse_channels,
    cast,
    check_tensors,
    first_difference,
    prepared_analysis,
    replay,
)
from autogate.slim.stale_optimizers import tell_of_steps_with

__all__ = [
    "ATTRIBUTE",
    "AnalysisOptions",
    "History",
    "PrepareRecord",
    "Slimming",
    "add_shortcut_convolutions",
    "analyse_channels",
    "as_optimizers",
    "cast",
    "check_finite",
    "check_not_sharded",
    "check_tensors",
    "describe_buffers",
    "describe_modules",
    "describe_tensors",
    "dtype_of",
    "first_difference",
    "history_of",
    "kept_by_side",
    "parameter_replacements",
    "prepared_analysis",
    "read_inputs",
    "recalibrate",
    "replace_parameters",
    "replay",
    "slim_unverified",
    "slim_verified",
    "slimming_from_json",
    "slimming_to_json",
    "tell_of_steps_with",
    "verify",
]
