"""Checkpoints: everything that resuming a run needs, in torch's format, with a checksum, read without pickled code.

The checkpoint before the newest is kept beside it. It is taken, with a warning, if the newest is damaged.

A checkpoint has no random number states. Before each batch all generators are seeded from the place in the run instead
(see `autogate.training.learning.seed_at`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from autogate.files import atomic_write
from autogate.slim import Slimming
from autogate.training.run_folder import RunInfo, from_json, to_json
from autogate.training.tensor_files import put_tensors, read_tensors
from rewriters import AutogateError

FORMAT = 4
_STATES = ("model", "optimizer", "scaler", "ema", "gates")
_OPTIONAL = ("scaler", "ema", "gates")
_ENTRIES = {"format", "run", "position", "slimmings", *_STATES}


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Attributes:
        epoch: the epoch being trained; 0 before the first one.
        batch: batches of the epoch that are done, in each process.
        step: optimizer steps so far.
        loss: sum of the losses of these batches, over all processes.
        seconds: the time that these batches took.
        lr: learning rate of the last step; None before the first step.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    lr: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        info: the run.
        position: how far the run is.
        model, optimizer: their state_dicts; the model's includes the gates, until it is finalized.
        scaler, ema: state_dicts of the gradient scaler and of the averaged model; None if there is none.
        gates: state_dict of the gate bank just before the model was finalized; None until then.
        slimmings: how the model and then the averaged one were slimmed; empty until then.
    """

    info: RunInfo
    position: Position
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any] | None
    ema: Mapping[str, Any] | None
    gates: Mapping[str, Any] | None
    slimmings: tuple[Slimming, ...] = ()


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint, and keep the one that was there as the previous one.

    Raises:
        AutogateError: the file could not be written; the checkpoints that were there are as they were.
    """
    found = {name: getattr(checkpoint, name) for name in _STATES}
    plain: dict[str, Any] = {"format": FORMAT, "run": to_json(checkpoint.info), "position": asdict(checkpoint.position)}
    plain["slimmings"] = [to_json(one) for one in checkpoint.slimmings]
    with atomic_write(path) as temporary:  # whole before the previous checkpoint goes
        put_tensors({**plain, **found}, temporary)
        if path.is_file():
            _keep(path, previous_checkpoint(path))


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"previous-{path.name}")


def _keep(path: Path, other: Path) -> None:
    """Make `other` the same file as `path`, without a moment in which either is missing."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        second = Path(folder) / path.name
        try:
            os.link(path, second)
        except OSError:  # some file systems have no hard links
            shutil.copy2(path, second)
        os.replace(second, other)


def load_newest(path: Path) -> tuple[Checkpoint, Path]:
    """Read the checkpoint at `path`; the previous one, with a warning, if the file is damaged or missing.

    Returns:
        The checkpoint, and the file that it is from.

    Raises:
        AutogateError: both are damaged; the error is the one of the newest.
        FileNotFoundError: there is none.

    Warns:
        UserWarning: the previous checkpoint is used.
    """
    try:
        return load_checkpoint(path), path
    except (AutogateError, FileNotFoundError) as error:
        previous = previous_checkpoint(path)
        try:
            found = load_checkpoint(previous)
        except (AutogateError, FileNotFoundError):
            raise error from None
        warnings.warn(
            f"{str(error).rstrip('.')}. The checkpoint before it is taken instead: {previous.name}, epoch "
            f"{found.position.epoch}, step {found.position.step}.",
            stacklevel=2,
        )
        return found, previous


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        AutogateError, FileNotFoundError: see `read_tensors`; or it is not a checkpoint, or one of another version.
    """
    found = read_tensors(path)
    if not isinstance(found, dict) or set(found) != _ENTRIES or found["format"] != FORMAT:
        raise AutogateError("it is not a checkpoint that this version of autogate train wrote.", where=str(path))
    if not isinstance(found["run"], str) or not _is_position(found["position"]):
        raise AutogateError(
            f"its {'position' if isinstance(found['run'], str) else 'run'} can't be read.", where=str(path)
        )
    if not isinstance(found["slimmings"], list) or not all(isinstance(text, str) for text in found["slimmings"]):
        raise AutogateError("its slimmings can't be read.", where=str(path))
    for name in _STATES:
        if not isinstance(found[name], dict) and not (name in _OPTIONAL and found[name] is None):
            raise AutogateError(
                f"its {name} is of type {type(found[name]).__name__}, not a state_dict.", where=str(path)
            )
    info = from_json(RunInfo, found["run"], str(path))
    state = {name: found[name] for name in _STATES}
    if (found["gates"] is None) != (not found["slimmings"]):
        raise AutogateError("it has gates without a record of the slimming, or the reverse.", where=str(path))
    slimmings = tuple(from_json(Slimming, text, str(path)) for text in found["slimmings"])
    return Checkpoint(info, Position(**found["position"]), **state, slimmings=slimmings)


def _is_position(found: Any) -> bool:
    """Whether these are the fields of a `Position`, with values that it can have."""
    if not isinstance(found, dict) or found.keys() != {field.name for field in fields(Position)}:
        return False
    counts = all(type(found[name]) is int and found[name] >= 0 for name in ("epoch", "batch", "step"))
    numbers = all(type(found[name]) in (int, float) for name in ("loss", "seconds"))
    return counts and numbers and type(found["lr"]) in (int, float, type(None))
