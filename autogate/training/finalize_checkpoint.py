"""Make the slim model of a run from its checkpoint, or its switchable model, without the images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from autogate import subnets
from autogate.api import gates
from autogate.files import data_config_of, save
from autogate.training.adaptive import mean_cost, result_of, with_choice
from autogate.training.checkpoint import Checkpoint, load_checkpoint, load_newest
from autogate.training.finalize_run import finalize_run, finalize_run_again
from autogate.training.network import ModelFunction, build_network, data_config, note_data_config, with_gates
from autogate.training.recipe import Widths
from autogate.training.run_folder import Result, RunFolder
from rewriters import AutogateError


@dataclass(frozen=True)
class FinalizedCheckpoint:
    """The file of a slim, switchable or adaptive model, its result, and the names of its subnets."""

    file: Path
    result: Result
    subnets: tuple[str, ...] = ()


def finalize_checkpoint(
    path: Path, out: Path | None = None, function: ModelFunction | None = None
) -> FinalizedCheckpoint:
    """Save a run's model as it is in the checkpoint: without its dead channels, or as a network of several widths.

    If the run averages its weights, the average is used. The run can be resumed afterwards. If the newest checkpoint of
    a run's folder is damaged, the one before it is taken, with a warning. A file that is named is taken or refused.

    Args:
        path: path of a checkpoint or of a run's folder. A run of several widths also needs the structures.json beside
            its checkpoint.
        out: path of the model; slim.safetensors or switchable.safetensors next to the checkpoint if None.
        function: as for `start`.

    Raises:
        AutogateError: there is no checkpoint, or it is damaged; or the run is to train several widths, and their
            channels aren't found yet.
        FileNotFoundError: there is no such file.

    Warns:
        BudgetNotMetWarning: the targets are not met.
    """
    folder = RunFolder(path if path.is_dir() else path.parent)
    widths = folder.info().recipe.subnets if path.is_dir() else None  # raises if there is no run
    if widths is not None:
        _structures(folder)  # until these are found there is no checkpoint either
    found, path = load_newest(folder.checkpoint_file) if path.is_dir() else (load_checkpoint(path), path)
    info, recipe = found.info, found.info.recipe
    model = build_network(recipe.network, info.num_classes, weights=False, function=function)
    config = {**data_config(model, recipe.network), "input_size": info.input_size}
    note_data_config(model, config, info.class_names, info.num_classes)
    names: tuple[str, ...] = ()
    if recipe.adaptive is not None:
        model, result = _adaptive(model, found, path)
    elif recipe.subnets is None:
        model, result = _slim(model, found, path)
    else:
        model, result = _switchable(model, found, path, recipe.subnets)
        names = tuple(row.structure.name for row in subnets.status(model).rows)
    file = folder.made_file(recipe)
    save(model.eval(), out or file)
    if out is None and folder.info_file.is_file():
        known = folder.result()
        if known is not None and known.step == result.step:
            result = replace(result, accuracy=known.accuracy)
        folder.finish(result)
    return FinalizedCheckpoint(out or file, result, names)


def _slim(model: nn.Module, found: Checkpoint, path: Path) -> tuple[nn.Module, Result]:
    """The slim model, and its result without an accuracy."""
    info, recipe = found.info, found.info.recipe
    model = with_gates(model, recipe.budget, info.input_size, info.steps, info.steps_per_epoch, recipe.method)
    used = 0 if found.ema is None else -1
    with _fitting(path):
        taken = None if found.gates is None else finalize_run_again(model, found.gates, found.slimmings[used:])
        model.load_state_dict(found.model if found.ema is None else found.ema)
    taken = taken or finalize_run(model)
    return model, taken.snapshot.result(model, info, found.position.step)


def _adaptive(model: nn.Module, found: Checkpoint, path: Path) -> tuple[nn.Module, Result]:
    """The model that chooses its channels for each image, and its result: the mean cost in training, no accuracy."""
    model = with_choice(model, found.info.recipe, found.info.input_size, found.info.steps)
    with _fitting(path):
        model.load_state_dict(found.model if found.ema is None else found.ema)
    return model, result_of(model, found.info, found.position.step, mean_cost(model))


def _switchable(model: nn.Module, found: Checkpoint, path: Path, widths: Widths) -> tuple[nn.Module, Result]:
    """The switchable model, and its result without an accuracy."""
    info, budget = found.info, replace(found.info.recipe.budget, flops=1.0)
    structures = _structures(RunFolder(path.parent))
    gated = with_gates(copy.deepcopy(model), budget, info.input_size, 1, 1, info.recipe.method)
    model = subnets.fuse(model, subnets.Found(structures, gates(gated).origin), nested=widths.nested)
    with _fitting(path):
        model.load_state_dict(found.model if found.ema is None else found.ema)
    sizes = info.flops, info.params
    result = Result(found.position.step, info.steps, *sizes, *sizes, {}, data_config=data_config_of(model))
    return model, result


def _structures(folder: RunFolder) -> tuple[subnets.Structure, ...]:
    """The channels of each subnet."""
    structures = folder.structures()
    if not structures:
        raise AutogateError(
            "the channels of its subnets aren't found yet.",
            where=str(folder.path),
            remedy=f"autogate train --resume {folder.path} goes on.",
        )
    return structures


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Raise AutogateError where PyTorch finds that weights don't fit."""
    try:
        yield
    except RuntimeError as error:
        raise AutogateError(f"its weights don't fit its model: {error}", where=str(path)) from error
