"""Checkpoints: everything that resuming a run needs, in torch's format, read without pickled code.

A checkpoint has no random number states. Before each batch all generators are seeded from the place in the run instead
(see `autogate.training.learning.seed_at`).
"""

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
    """

    info: RunInfo
    position: Position
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any] | None
    ema: Mapping[str, Any] | None
    gates: Mapping[str, Any] | None


def write_tensors(value: Any, path: Path) -> None:
    """Write tensors and plain values in torch's format, completely or not at all.

    Raises:
        AutogateError: the file could not be written.
    """
    with atomic_write(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # what torch raises for a full disk
            raise OSError(str(error).splitlines()[0]) from error


def read_tensors(path: Path) -> Any:
    """Read a file that `write_tensors` wrote. Other pickles are refused.

    Raises:
        AutogateError: the file is damaged, or not such a file.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise AutogateError(
            f"it is damaged, or not a checkpoint: {(str(error).strip().splitlines() or ['empty'])[0]}",
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
        AutogateError, FileNotFoundError: see `read_tensors`.
    """
    found = read_tensors(path)
    if not isinstance(found, dict) or set(found) != _ENTRIES or found["format"] != FORMAT:
        raise AutogateError("it is not a checkpoint that this version of autogate train wrote.", where=str(path))
    info = from_json(RunInfo, found["run"], str(path))
    state = {name: found[name] for name in _STATES}
    return Checkpoint(info, Position(**found["position"]), **state)
