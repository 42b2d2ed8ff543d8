"""From dead classes to the slim model: slimmed, verified, and recorded in a `History`."""

from autogate.slim.finalizing import PrepareRecord, check_finite, check_not_sharded, slim_verified, verify
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
)
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

__all__ = [
    "ATTRIBUTE",
    "AnalysisOptions",
    "History",
    "KeptIndices",
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
    "live_classes",
    "parameter_replacements",
    "read_inputs",
    "recalibrate",
    "replace_parameters",
    "replay",
    "slim_and_record",
    "slim_verified",
    "verify",
]
