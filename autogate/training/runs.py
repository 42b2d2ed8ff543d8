"""Start a training run and resume it: from a recipe to a run folder with a slim model in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from autogate.training.callbacks import Callback
from autogate.training.checkpoint import Position, load_checkpoint, read_tensors, write_tensors
from autogate.training.data import find_data
from autogate.training.distributed import World
from autogate.training.learning import seed_at
from autogate.training.loop import Loop, Stop
from autogate.training.network import build_network
from autogate.training.recipe import Recipe
from autogate.training.run_folder import Result, RunFolder
from rewriters import AutogateError


def start(
    recipe: Recipe, path: Path, world: World | None = None, callbacks: Sequence[Callback] = (),
    stop: Stop = lambda: False,
) -> Result | None:  # fmt: skip
    """Train a model with gates and finalize it.

    Args:
        recipe: what to do.
        path: of the run's folder, which must be new or empty.
        world: the processes that train; all of them call this. One on the CPU, if None.
        callbacks: are told how it goes.
        stop: see there.

    Returns:
        What the slim model came to; None if the run was stopped.

    Raises:
        AutogateError: the data, the model, the budget or the folder can't be had so; the loss is not finite.
    """
    world, folder = world or World(), RunFolder(path)
    if world.main:
        folder.check_free()
    seed_at(recipe.seed)
    data = find_data(recipe.images)
    model = build_network(recipe.network, recipe.network.num_classes or data.num_classes).to(world.device)
    teacher = copy.deepcopy(model) if recipe.distillation is not None else None
    loop = Loop.on(recipe, data, model, teacher, folder, world)
    if world.main:
        folder.create(loop.info)
        if teacher is not None:
            write_tensors(teacher.state_dict(), folder.teacher_file)
    return loop.run(Position(), callbacks, stop)


def resume(
    path: Path, world: World | None = None, callbacks: Sequence[Callback] = (), stop: Stop = lambda: False,
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> Result | None:  # fmt: skip
    """Go on with a run where its checkpoint is: on a CPU with the same weights, bit for bit, as if it had not stopped.

    Args:
        path, world, callbacks, stop: as for `start`.
        change: what is different from now on: where the images lie, the number of workers, the device. With other
            workers, other random crops are drawn.

    Raises:
        AutogateError: as `start`; there is no run or no checkpoint, or it doesn't fit the data or the number of
            processes.
    """
    world, folder = world or World(), RunFolder(path)
    info = folder.info()
    result = folder.result()
    if result is not None and result.complete and folder.slim_file.is_file():
        return result
    if world.size != info.processes:
        raise AutogateError(
            f"there are {world.size} processes, and were {info.processes} when the run began.", where=str(path)
        )
    if not folder.checkpoint_file.is_file():
        raise AutogateError(
            "the run has no checkpoint yet.", where=str(path), remedy="Delete the folder and start anew."
        )
    found, recipe = load_checkpoint(folder.checkpoint_file), change(info.recipe)
    seed_at(recipe.seed)
    data = find_data(recipe.images)
    model = build_network(recipe.network, info.num_classes, weights=False).to(world.device)
    teacher = None
    if recipe.distillation is not None:
        teacher = copy.deepcopy(model)
        teacher.load_state_dict(read_tensors(folder.teacher_file))
    loop = Loop.on(recipe, data, model, teacher, folder, world)
    for name in ("num_classes", "train_images", "val_images", "batches", "steps", "gates"):
        now, then = getattr(loop.info, name), getattr(info, name)
        if now != then:
            raise AutogateError(
                f"{name.replace('_', ' ')}: there are {now} and were {then} when the run began.", where=str(path)
            )
    loop.load(found)
    if world.main:
        folder.rewind(found.position.epoch)
    world.wait()
    return loop.run(found.position, callbacks, stop)
