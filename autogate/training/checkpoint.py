"""A run in a file: all that going on needs, in torch's format, read without pickled code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autogate.files import atomic_write
from autogate.training.run_folder import RunInfo, from_json, to_json
from rewriters import AutogateError

FORMAT = 2
_STATES = ("model", "optimizer", "scaler", "ema", "gates")
_ENTRIES = {"format", "run", "position", *_STATES}


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Attributes:
        epoch: that is being trained; 0 before the first.
        batch: batches of it that are done, in each process.
        step: optimizer steps in all.
        loss: sum of the losses of these batches, over all processes.
        seconds: that they took.
        lr: learning rate of the last step; None before the first.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    lr: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What stands in a file.

    Attributes:
        info: the run that it belongs to.
        position: how far that was.
        model, optimizer: their state_dicts; the model's has the gates, as long as it has some.
        scaler, ema: those of the gradient scaler and of the averaged model, where there are such.
        gates: that of the gates just before their channels were taken out; None as long as they are there.
    """

    info: RunInfo
    position: Position
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any] | None
    ema: Mapping[str, Any] | None
    gates: Mapping[str, Any] | None


def write_tensors(value: Any, path: Path) -> None:
    """Write tensors and plain values in torch's format; a file that was there before is whole until then.

    Raises:
        AutogateError: it could not be written.
    """
    with atomic_write(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # how torch tells of a full disk
            raise OSError(str(error).splitlines()[0]) from error


def read_tensors(path: Path) -> Any:
    """What `write_tensors` wrote; other pickles are not read.

    Raises:
        AutogateError: it is none of its files, or damaged.
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise AutogateError(
            f"it is damaged, or no checkpoint: {str(error).strip().splitlines()[0] if str(error).strip() else 'empty'}",
            where=str(path),
        ) from error


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint; see `write_tensors`."""
    found = {name: getattr(checkpoint, name) for name in _STATES}
    plain = {"format": FORMAT, "run": to_json(checkpoint.info), "position": asdict(checkpoint.position)}
    write_tensors({**plain, **found}, path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        AutogateError, FileNotFoundError: as `read_tensors`.
    """
    found = read_tensors(path)
    if not isinstance(found, dict) or set(found) != _ENTRIES or found["format"] != FORMAT:
        raise AutogateError("it is no checkpoint of autogate train.", where=str(path))
    info = from_json(RunInfo, found["run"], str(path))
    state = {name: found[name] for name in _STATES}
    return Checkpoint(info, Position(**found["position"]), **state)
