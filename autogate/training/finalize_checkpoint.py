"""Make the slim model of a run from its checkpoint, without the images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from autogate.files import save
from autogate.training.checkpoint import load_checkpoint, load_newest
from autogate.training.finalize_run import finalize_run, finalize_run_again
from autogate.training.network import ModelFunction, build_network, data_config, note_data_config, with_gates
from autogate.training.run_folder import Result, RunFolder
from rewriters import AutogateError


@dataclass(frozen=True)
class FinalizedCheckpoint:
    """The file of a slim model, and its result."""

    file: Path
    result: Result


def finalize_checkpoint(
    path: Path, out: Path | None = None, function: ModelFunction | None = None
) -> FinalizedCheckpoint:
    """Remove the dead channels from a run's model as it is in the checkpoint, if they aren't removed yet, and save it.

    If the run averages its weights, the average is used. The run can be resumed afterwards. If the newest checkpoint of
    a run's folder is damaged, the one before it is taken, with a warning. A file that is named is taken or refused.

    Args:
        path: path of a checkpoint or of a run's folder.
        out: path of the slim model; slim.safetensors next to the checkpoint if None.
        function: as for `start`.

    Raises:
        AutogateError: there is no checkpoint, or it is damaged; or the run trains several widths.
        FileNotFoundError: there is no such file.

    Warns:
        BudgetNotMetWarning: the targets are not met.
    """
    folder = RunFolder(path if path.is_dir() else path.parent)
    if path.is_dir():
        folder.info()  # raises if there is no run
        found, path = load_newest(folder.checkpoint_file)
    else:
        found = load_checkpoint(path)
    info, recipe = found.info, found.info.recipe
    if recipe.subnets is not None:
        raise AutogateError(
            "the run trains several widths in one network, and has no slim model.",
            where=str(path),
            remedy=f"autogate train --resume {folder.path} goes on to its end; autogate.subnets.extract takes one out.",
        )
    model = build_network(recipe.network, info.num_classes, weights=False, function=function)
    config = {**data_config(model, recipe.network), "input_size": info.input_size}
    note_data_config(model, config, info.class_names, info.num_classes)
    model = with_gates(model, recipe.budget, info.input_size, info.steps, recipe.method)
    used = 0 if found.ema is None else -1
    try:
        taken = None if found.gates is None else finalize_run_again(model, found.gates, found.slimmings[used:])
        model.load_state_dict(found.model if found.ema is None else found.ema)
    except RuntimeError as error:
        raise AutogateError(f"its weights don't fit its model: {error}", where=str(path)) from error
    taken = taken or finalize_run(model)
    result = taken.snapshot.result(model, info, found.position.step)
    save(model.eval(), out or folder.slim_file)
    if out is None and folder.info_file.is_file():
        known = folder.result()
        if known is not None and known.step == result.step:
            result = replace(result, accuracy=known.accuracy)
        folder.finish(result)
    return FinalizedCheckpoint(out or folder.slim_file, result)
