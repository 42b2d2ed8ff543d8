"""A training run with gates, from images to the slim model: what `autogate train` does, as functions.

A `Recipe` says what to do, `start` does it and writes a `RunFolder`, `resume` goes on with one.
"""

from autogate.training.distributed import World, joined
from autogate.training.finishing import Finished, finalize_checkpoint
from autogate.training.loop import resume, start
from autogate.training.recipe import Budget, Distillation, Images, Learning, Network, Recipe
from autogate.training.run_folder import EpochRow, GateRow, LayerSize, Result, RunFolder, RunInfo
from autogate.training.watching import Moment, Watcher

__all__ = [
    "Budget",
    "Distillation",
    "EpochRow",
    "Finished",
    "GateRow",
    "Images",
    "LayerSize",
    "Learning",
    "Moment",
    "Network",
    "Recipe",
    "Result",
    "RunFolder",
    "RunInfo",
    "Watcher",
    "World",
    "finalize_checkpoint",
    "joined",
    "resume",
    "start",
]
