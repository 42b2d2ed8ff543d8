"""The folder of a training run: what is written there, and read by `resume`, `finalize` and `report`.

run.json            what was asked for and what it meant for this model and this data (RunInfo)
metrics.csv         a row an epoch (EpochRow)
gates.jsonl         a line an epoch: histogram of the gates, widths of all layers (GateRow)
last.pt             checkpoint to go on from
dense.pt            the teacher's weights, where the run distills
slim.safetensors    the slim model, as autogate.save writes it
result.json         what the slim model came to (Result)
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from autogate.files import atomic_write
from autogate.training.recipe import Recipe
from rewriters import AutogateError

BINS = 20
"""Of the histogram of gates, over [0, 1]."""


@dataclass(frozen=True)
class LayerSize:
    """A convolution or linear layer as it is in the dense model; `flops` are its multiply-adds for one image."""

    module: str
    inputs: int
    outputs: int
    flops: float


@dataclass(frozen=True)
class RunInfo:
    """What a run was asked for, and what that meant.

    Attributes:
        format: version of the folder's layout.
        versions: of autogate, torch and timm, when it began.
        recipe: what was asked for.
        num_classes: outputs of the model.
        input_size: channels, height and width of an image.
        train_images, val_images: how many there are.
        processes: that train.
        batches: an epoch and process.
        steps_per_epoch, steps: optimizer steps, an epoch and in all.
        gates: how many there are.
        targets: the share that shall be left of each resource.
        flops, params: of the dense model.
        layers: of the dense model, in the order they run.
    """

    format: Literal[1]
    versions: Mapping[str, str]
    recipe: Recipe
    num_classes: int
    input_size: tuple[int, int, int]
    train_images: int
    val_images: int
    processes: int
    batches: int
    steps_per_epoch: int
    steps: int
    gates: int
    targets: Mapping[str, float]
    flops: float
    params: int
    layers: tuple[LayerSize, ...]


@dataclass(frozen=True)
class EpochRow:
    """How the run stands after an epoch. Epoch 0 is the dense model, before anything was trained.

    Attributes:
        epoch, step: epochs and optimizer steps so far.
        lr: learning rate of the last step; None for epoch 0, like the two that follow.
        train_loss: mean over the epoch.
        seconds: that its training took.
        accuracy: top 1 on the validation images, in percent.
        ema_accuracy: that of the averaged weights, None without such.
        flops, params: share that is left.
        live, gates: gates that are alive, and all.
        settled: whether the targets have been met.
    """

    epoch: int
    step: int
    lr: float | None
    train_loss: float | None
    seconds: float | None
    accuracy: float
    ema_accuracy: float | None
    flops: float
    params: float
    live: int
    gates: int
    settled: bool


@dataclass(frozen=True)
class GateRow:
    """The gates after an epoch.

    Attributes:
        epoch, step: as in `EpochRow`.
        dead: gates that are closed for good.
        histogram: how many of the others lie in each of `BINS` equal parts of [0, 1].
        inputs, outputs: channels left of each layer, in the order of `RunInfo.layers`.
    """

    epoch: int
    step: int
    dead: int
    histogram: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """What the slim model came to.

    Attributes:
        step, steps: optimizer steps taken, and those that the run was to take.
        flops, params: of the slim model.
        dense_flops, dense_params: of the dense one.
        shares: that are left of each resource with a target.
        accuracy: of the slim model, in percent; None where no images were at hand.
    """

    step: int
    steps: int
    flops: float
    params: int
    dense_flops: float
    dense_params: int
    shares: Mapping[str, float]
    accuracy: float | None = None

    @property
    def complete(self) -> bool:
        """Whether all steps were taken and the slim model tried."""
        return self.step == self.steps and self.accuracy is not None


T = TypeVar("T")


def to_json(value: Any) -> str:
    """A frozen value as JSON."""
    return TypeAdapter(type(value)).dump_json(value, indent=1).decode()


def from_json(kind: type[T], text: str, where: str) -> T:
    """The value that JSON tells.

    Raises:
        AutogateError: it doesn't tell one.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(map(str, first["loc"])) or "text"
        raise AutogateError(
            f"its {part} can't be read: {first['msg']}.",
            where=where,
            remedy="It may be from another version of autogate.",
        ) from error


class RunFolder:
    """A run's folder. Files that are read again are written whole or not at all.

    Args:
        path: of the folder, which need not be there yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.info_file = path / "run.json"
        self.metrics_file = path / "metrics.csv"
        self.gates_file = path / "gates.jsonl"
        self.checkpoint_file = path / "last.pt"
        self.teacher_file = path / "dense.pt"
        self.slim_file = path / "slim.safetensors"
        self.result_file = path / "result.json"

    def check_free(self) -> None:
        """Raises AutogateError if a run, or anything else, is here already."""
        if self.info_file.exists():
            raise AutogateError(
                "there is a run in this folder already.",
                where=str(self.path),
                remedy=f"Go on with it, autogate train --resume {self.path}, or name another folder with --out.",
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise AutogateError("it is not an empty folder.", where=str(self.path), remedy="Name another with --out.")

    def create(self, info: RunInfo) -> None:
        """Make the folder, with what the run is."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(self.metrics_file, _csv_line([field.name for field in fields(EpochRow)]))
        self._write(self.gates_file, "")
        self._write(self.info_file, to_json(info))

    def info(self) -> RunInfo:
        """What the run is.

        Raises:
            AutogateError: there is no run, or it can't be read.
        """
        if not self.info_file.is_file():
            raise AutogateError("there is no run in this folder: it has no run.json.", where=str(self.path))
        return from_json(RunInfo, self.info_file.read_text(), str(self.info_file))

    def metrics(self) -> tuple[EpochRow, ...]:
        """A row for each epoch so far."""
        with self.metrics_file.open(newline="") as lines:
            found = [{name: text or None for name, text in row.items()} for row in csv.DictReader(lines)]
        return tuple(from_json(EpochRow, json.dumps(row), str(self.metrics_file)) for row in found)

    def gates(self) -> tuple[GateRow, ...]:
        """The gates after each epoch so far."""
        lines = self.gates_file.read_text().splitlines()
        return tuple(from_json(GateRow, line, str(self.gates_file)) for line in lines)

    def result(self) -> Result | None:
        """What the slim model came to, None if there is none yet."""
        if not self.result_file.is_file():
            return None
        return from_json(Result, self.result_file.read_text(), str(self.result_file))

    def add(self, row: EpochRow, gates: GateRow) -> None:
        """Write down an epoch."""
        with self.metrics_file.open("a", newline="") as lines:
            lines.write(_csv_line(["" if value is None else value for value in asdict(row).values()]))
        with self.gates_file.open("a") as lines:
            lines.write(json.dumps(asdict(gates)) + "\n")

    def rewind(self, epoch: int) -> None:
        """Forget what was written of `epoch` and later ones, which are going to be trained again."""
        for file, keep in ((self.metrics_file, epoch + 1), (self.gates_file, epoch)):  # a line an epoch, and the names
            self._write(file, "".join(file.read_text().splitlines(keepends=True)[:keep]))

    def finish(self, result: Result) -> None:
        """Write down what the slim model came to."""
        self._write(self.result_file, to_json(result))

    def _write(self, file: Path, text: str) -> None:
        with atomic_write(file) as temporary:
            temporary.write_text(text)


def _csv_line(values: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
