"""From dead classes to the slim model: slimmed, verified, and recorded in a `History`."""

from autogate.slim.collapse import signs_of_collapse
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
    KeptIndices,
    Slimming,
    describe_buffers,
    describe_modules,
    describe_tensors,
    dtype_of,
    history_of,
    kept_by_side,
    kept_indices,
    read_inputs,
    slimming_from_json,
    slimming_to_json,
)
from autogate.slim.layers import Layer, layers_of
from autogate.slim.optimizer_state import as_optimizers, parameter_replacements, replace_parameters
from autogate.slim.recalibration import recalibrate
from autogate.slim.record_replay import (
    AnalysisOptions,
    add_shortcut_convolutions,
    analyse_with_dry_run,
    cast,
    check_tensors,
    first_difference,
    live_classes,
    replay,
    slim_and_record,
)
from autogate.slim.stale_optimizers import tell_of_steps_with

__all__ = [
    "ATTRIBUTE",
    "AnalysisOptions",
    "History",
    "KeptIndices",
    "Layer",
    "PrepareRecord",
    "Slimming",
    "add_shortcut_convolutions",
    "analyse_with_dry_run",
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
    "kept_indices",
    "layers_of",
    "live_classes",
    "parameter_replacements",
    "read_inputs",
    "recalibrate",
    "replace_parameters",
    "replay",
    "signs_of_collapse",
    "slim_and_record",
    "slim_unverified",
    "slim_verified",
    "slimming_from_json",
    "slimming_to_json",
    "tell_of_steps_with",
    "verify",
]
