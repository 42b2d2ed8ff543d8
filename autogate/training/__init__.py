"""A training run with gates, from images to the slim model: what `autogate train` does, as functions.

`start` carries out a `Recipe` and writes a `RunFolder`; `resume` continues an interrupted run.
"""

from autogate.training.adaptive import SHOWN
from autogate.training.callbacks import Callback, StepMetrics, TensorBoard
from autogate.training.distributed import World, join_world
from autogate.training.finalize_checkpoint import FinalizedCheckpoint, finalize_checkpoint
from autogate.training.image_use import ImageUse
from autogate.training.network import ModelFunction, build_network, data_config, is_slim_file, names_function
from autogate.training.pruning import Folder, Pruned, prune
from autogate.training.recipe import SCHEDULES, Budget, Choice, Distillation, Images, Learning, Network, Recipe, Widths
from autogate.training.run_folder import (
    BINS,
    EpochRow,
    GateRow,
    LayerSize,
    Result,
    RunFolder,
    RunInfo,
    SubnetRow,
    SubnetSize,
)
from autogate.training.runs import resume, start
from autogate.training.validating import Validation, validate

__all__ = [
    "BINS",
    "SCHEDULES",
    "SHOWN",
    "Budget",
    "Callback",
    "Choice",
    "Distillation",
    "EpochRow",
    "FinalizedCheckpoint",
    "Folder",
    "GateRow",
    "ImageUse",
    "Images",
    "LayerSize",
    "Learning",
    "ModelFunction",
    "Network",
    "Pruned",
    "Recipe",
    "Result",
    "RunFolder",
    "RunInfo",
    "StepMetrics",
    "SubnetRow",
    "SubnetSize",
    "TensorBoard",
    "Validation",
    "Widths",
    "World",
    "build_network",
    "data_config",
    "finalize_checkpoint",
    "is_slim_file",
    "join_world",
    "names_function",
    "prune",
    "resume",
    "start",
    "validate",
]
