"""Start and resume training runs: from a recipe to a run folder with a slim model."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from autogate.api import gates
from autogate.subnets import Found
from autogate.training.adaptive import AdaptiveLoop, check_choice
from autogate.training.callbacks import Callback, TensorBoard
from autogate.training.checkpoint import Checkpoint, Position, load_newest
from autogate.training.data import DataSets, find_data
from autogate.training.distributed import World
from autogate.training.epochs import Epochs, Stop
from autogate.training.learning import seed_at
from autogate.training.loop import Loop
from autogate.training.network import ModelFunction, build_network
from autogate.training.recipe import Recipe
from autogate.training.run_folder import Result, RunFolder, RunInfo
from autogate.training.structures import check_widths, find_structures
from autogate.training.switchable import SwitchableLoop, describe_widths
from autogate.training.tensor_files import read_tensors, write_tensors
from rewriters import AutogateError


def start(
    recipe: Recipe, path: Path, world: World | None = None, callbacks: Sequence[Callback] = (),
    stop: Stop = lambda: False, function: ModelFunction | None = None,
) -> Result | None:  # fmt: skip
    """Train a model with gates and finalize it.

    Args:
        recipe: what to do.
        path: path of the run's folder, which must be new or empty.
        world: the processes that train; all of them call this. A single process on the CPU if None.
        callbacks: called with the progress of the run.
        stop: whether to write a checkpoint and stop; called after every step.
        function: what builds the model, if its name is "package.module:function".

    Returns:
        The result for the slim model; None if the run was stopped.

    Raises:
        AutogateError: the data, model, budget or folder can't be used; or the loss is no longer finite.
    """
    world, folder = world or World(), RunFolder(path)
    if world.main:
        folder.check_free()
    if recipe.adaptive is not None:
        check_choice(recipe, recipe.adaptive)
    if recipe.subnets is not None:
        return _run_widths(_Widths(recipe, folder, world, callbacks, stop, function), None)
    seed_at(recipe.seed)
    data = find_data(recipe.images)
    model = build_network(recipe.network, recipe.network.num_classes or data.num_classes, function=function)
    model = model.to(world.device)
    teacher = copy.deepcopy(model) if recipe.distillation is not None else None
    loop = _loop(recipe, data, model, teacher, folder, world)
    if world.main:
        folder.create(loop.info)
        if teacher is not None:
            write_tensors(teacher.state_dict(), folder.teacher_file)
    return loop.run(Position(), callbacks, stop)


def resume(
    path: Path, world: World | None = None, callbacks: Sequence[Callback] = (), stop: Stop = lambda: False,
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe, function: ModelFunction | None = None,
) -> Result | None:  # fmt: skip
    """Continue a run from its checkpoint. On a CPU the weights are the same, bit for bit, as without the interruption.

    Args:
        path, world, callbacks, stop, function: as for `start`.
        change: changes the recipe from now on: where the images are, the number of workers, the device, the epochs.
            Another number of workers draws other random crops. More epochs than planned make the run longer, a
            finished one too: the learning rate follows the schedule of the longer run from where it is, and targets
            that are not met yet have its steps. run.json then has the longer run.

    Raises:
        AutogateError: as for `start`; or there is no run or no checkpoint, or it is damaged and so is the one before
            it, or it doesn't fit the data or the number of processes, or the epochs are fewer than planned.

    Warns:
        UserWarning: the newest checkpoint is damaged; the run goes on from the one before it.
    """
    world, folder = world or World(), RunFolder(path)
    info = folder.info()
    recipe, planned = change(info.recipe), info.recipe.learning.epochs
    if recipe.learning.epochs < planned:
        raise AutogateError(
            f"epochs={recipe.learning.epochs} is fewer than the {planned} of the run; it can only be made longer.",
            where=str(path),
            remedy="autogate finalize makes the slim model of an unfinished run.",
        )
    result = folder.result()
    steps = recipe.learning.epochs * info.steps_per_epoch  # an older result may be that of a shorter run
    if result is not None and result.complete and result.steps == steps and folder.made_file(recipe).is_file():
        return result
    if world.size != info.processes:
        raise AutogateError(
            f"there are {world.size} processes now, and there were {info.processes} when the run started.",
            where=str(path),
            remedy="Resume with the same number of processes.",
        )
    if recipe.subnets is not None:
        return _run_widths(_Widths(recipe, folder, world, callbacks, stop, function), info)
    try:
        found, file = load_newest(folder.checkpoint_file)
    except FileNotFoundError as error:
        raise AutogateError(
            "the run has no checkpoint yet.", where=str(path), remedy="Delete the folder and start the run again."
        ) from error
    seed_at(recipe.seed)
    data = find_data(recipe.images)
    model = build_network(recipe.network, info.num_classes, weights=False, function=function).to(world.device)
    teacher = None
    if recipe.distillation is not None:
        teacher = copy.deepcopy(model)
        teacher.load_state_dict(read_tensors(folder.teacher_file))
    loop = _loop(recipe, data, model, teacher, folder, world)
    _check_same(loop.info, info, path)
    return _go_on(loop, found, file, info, callbacks, stop)


def _loop(
    recipe: Recipe, data: DataSets, model: nn.Module, teacher: nn.Module | None, folder: RunFolder, world: World
) -> Loop | AdaptiveLoop:
    kind: type[Loop | AdaptiveLoop] = Loop if recipe.adaptive is None else AdaptiveLoop
    return kind.prepare(recipe, data, model, teacher, folder, world)


def _check_same(now: RunInfo, then: RunInfo, path: Path) -> None:
    for name in ("num_classes", "train_images", "val_images", "batches", "steps_per_epoch", "gates"):
        here, there = getattr(now, name), getattr(then, name)
        if here != there:
            raise AutogateError(
                f"{name.replace('_', ' ')}: there are {here} now, and there were {there} when the run started.",
                where=str(path),
            )


def _go_on(
    loop: Epochs, found: Checkpoint, file: Path, info: RunInfo, callbacks: Sequence[Callback], stop: Stop
) -> Result | None:
    """Continue a run from a checkpoint that was read from a file."""
    folder, world, epochs = loop.folder, loop.world, loop.recipe.learning.epochs
    loop.load(found)
    if world.main:
        folder.rewind(found.position.epoch)
        if epochs > info.recipe.learning.epochs:
            folder.lengthen(epochs)
    world.wait()
    if world.main and file != folder.checkpoint_file:  # else the damaged one would become the previous one
        os.replace(file, folder.checkpoint_file)
    return loop.run(found.position, callbacks, stop)


class _Widths(NamedTuple):
    """A run of several widths: what `start` and `resume` are given."""

    recipe: Recipe
    folder: RunFolder
    world: World
    callbacks: Sequence[Callback]
    stop: Stop
    function: ModelFunction | None

    def train(self, recipe: Recipe, folder: RunFolder, resumed: bool) -> bool:
        """Train one width with gates, in a folder of its own. Returns whether that came to its end."""
        callbacks = [one for one in self.callbacks if not isinstance(one, TensorBoard)]
        if not resumed:
            return start(recipe, folder.path, self.world, callbacks, self.stop, self.function) is not None

        def moved(then: Recipe) -> Recipe:
            return replace(then, images=recipe.images, device=recipe.device)

        return resume(folder.path, self.world, callbacks, self.stop, moved, self.function) is not None


def _run_widths(run: _Widths, then: RunInfo | None) -> Result | None:
    """Find the channels of each width and train them together, from where the run is.

    Args:
        run: the run.
        then: what its folder says of it; None if it starts.
    """
    recipe, folder, world = run.recipe, run.folder, run.world
    assert recipe.subnets is not None
    check_widths(recipe, recipe.subnets)
    found = load_newest(folder.checkpoint_file) if folder.checkpoint_file.is_file() else None
    seed_at(recipe.seed)
    data = find_data(recipe.images)
    classes = recipe.network.num_classes or data.num_classes if then is None else then.num_classes
    model = build_network(recipe.network, classes, weights=found is None, function=run.function).to(world.device)
    info, prepared = describe_widths(recipe, data, model, world)
    if then is not None:
        _check_same(info, then, folder.path)
    elif world.main:
        folder.create(info)
    structures = find_structures(info, folder, world, model, run.function, run.train)
    if structures is None:
        return None
    bank = gates(prepared)
    loop = SwitchableLoop.prepare(info, data, model, Found(structures, bank.origin), bank.channel_map, folder, world)
    if found is None or then is None:
        return loop.run(Position(), run.callbacks, run.stop)
    return _go_on(loop, *found, then, run.callbacks, run.stop)
