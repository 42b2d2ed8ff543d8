"""The folder of a training run: its files, which `resume`, `finalize` and `report` read.

run.json            the recipe, and what it means for this model and this data (RunInfo)
metrics.csv         one row per epoch (EpochRow)
gates.jsonl         one line per epoch: histogram of the gates, widths of all layers (GateRow)
last.pt             the checkpoint to resume from
previous-last.pt    the one before it, in case that is damaged
dense.pt            the teacher's weights, if the run distills
slim.safetensors    the slim model, as autogate.save writes it
switchable.safetensors  in its place, if the run trains several widths: the network with all its subnets
structures.json     the channels of each subnet
subnets.json        what each subnet is, and at the end what it does (SubnetSize)
subnets.csv         one row per subnet and epoch (SubnetRow)
find/SHARE/         the folder of the run that found a subnet's channels
adaptive.safetensors    in its place, if channels are chosen for each image
use.json            what the validation images use of that model (ImageUse)
cheapest.png, dearest.png   images that take least and most of it
result.json         the result for the slim model (Result)
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from autogate.files import DataConfig, atomic_write
from autogate.switching import Structure
from autogate.training.image_use import ImageUse
from autogate.training.recipe import Recipe
from rewriters import AutogateError

BINS = 20
"""Bins of the histogram of gates, over [0, 1]."""


@dataclass(frozen=True)
class LayerSize:
    """A convolution or linear layer of the dense model; `flops` are its multiply-adds for one image."""

    module: str
    inputs: int
    outputs: int
    flops: float


@dataclass(frozen=True)
class RunInfo:
    """The recipe of a run, and what it means for this model and this data.

    Attributes:
        format: version of the folder's layout.
        versions: versions of autogate, torch and timm that started the run.
        recipe: the recipe.
        num_classes: number of outputs of the model.
        input_size: channels, height and width of an image.
        train_images, val_images: number of images.
        processes: number of processes that train.
        batches: batches per epoch and process.
        steps_per_epoch, steps: optimizer steps per epoch, and in all.
        gates: number of gates.
        targets: the target share of each resource.
        flops, params: FLOPs and parameters of the dense model.
        layers: layers of the dense model, in the order they run.
        class_names: names of the data's classes, in the order of their numbers; empty if it doesn't name them.
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
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class EpochRow:
    """The state of a run after an epoch. Epoch 0 is the dense model, before any training.

    Attributes:
        epoch, step: epochs and optimizer steps so far.
        lr: learning rate of the last step; None for epoch 0.
        train_loss: mean loss over the epoch; None for epoch 0.
        seconds: time that its training took; None for epoch 0.
        accuracy: top 1 on the validation images, in percent.
        ema_accuracy: accuracy of the averaged weights; None if they aren't averaged.
        flops, params: shares that are left.
        live, gates: number of live gates, and of all gates.
        settled: whether the targets are met.
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
        dead: number of dead gates.
        histogram: number of live gates in each of `BINS` equal parts of [0, 1].
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
    """The result of a run, for the slim model.

    Attributes:
        step, steps: optimizer steps taken, and planned.
        flops, params: FLOPs and parameters of the slim model.
        dense_flops, dense_params: the same for the dense model.
        shares: share of each resource with a target that is left.
        accuracy: accuracy of the slim model, in percent; None if no images were available.
        data_config: how images become its inputs, and the names of its classes.
        removed, rewritten: its modules that were removed, and those whose forward was rewritten and why, as in
            `autogate.summary`.
    """

    step: int
    steps: int
    flops: float
    params: int
    dense_flops: float
    dense_params: int
    shares: Mapping[str, float]
    accuracy: float | None = None
    data_config: DataConfig | None = None
    removed: tuple[str, ...] = ()
    rewritten: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all steps were taken and the slim model was evaluated."""
        return self.step == self.steps and self.accuracy is not None


@dataclass(frozen=True)
class SubnetRow:
    """A subnet after an epoch.

    Attributes:
        epoch, step: as in `EpochRow`.
        name: the subnet.
        accuracy: top 1 on the validation images, in percent.
    """

    epoch: int
    step: int
    name: str
    accuracy: float


@dataclass(frozen=True)
class SubnetSize:
    """A subnet of a run.

    Attributes:
        name: the subnet.
        flops, params: its shares of the dense model's.
        outputs: output channels of each layer, in the order of `RunInfo.layers`.
        accuracy: at the end of the run, in percent.
        seconds: of a forward over one image, measured at the end of the run.
    """

    name: str
    flops: float
    params: float
    outputs: tuple[int, ...]
    accuracy: float | None = None
    seconds: float | None = None


T = TypeVar("T")


def to_json(value: Any, kind: Any = None) -> str:
    """Write a dataclass as JSON; a value of another kind if that is named."""
    return TypeAdapter(kind or type(value)).dump_json(value, indent=1).decode()


def from_json(kind: type[T], text: str, where: str) -> T:
    """Read a dataclass from JSON.

    Raises:
        AutogateError: the JSON doesn't fit the dataclass.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(map(str, first["loc"])) or "text"
        raise AutogateError(
            f"its {part} can't be read: {first['msg']}.",
            where=where,
            remedy="The file may be from another version of autogate.",
        ) from error


class RunFolder:
    """A run's folder. Files that are read again are written completely or not at all.

    Args:
        path: path of the folder, which need not exist yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.info_file = path / "run.json"
        self.metrics_file = path / "metrics.csv"
        self.gates_file = path / "gates.jsonl"
        self.checkpoint_file = path / "last.pt"
        self.teacher_file = path / "dense.pt"
        self.slim_file = path / "slim.safetensors"
        self.switchable_file = path / "switchable.safetensors"
        self.adaptive_file = path / "adaptive.safetensors"
        self.use_file = path / "use.json"
        self.picture_files = path / "cheapest.png", path / "dearest.png"
        self.structures_file = path / "structures.json"
        self.sizes_file = path / "subnets.json"
        self.subnets_file = path / "subnets.csv"
        self.result_file = path / "result.json"

    def check_free(self) -> None:
        """Raise AutogateError if the folder has a run or anything else in it."""
        if self.info_file.exists():
            raise AutogateError(
                "there is already a run in this folder.",
                where=str(self.path),
                remedy=f"Resume it with autogate train --resume {self.path}, or name another folder with --out.",
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise AutogateError(
                "it is not an empty folder.", where=str(self.path), remedy="Name another folder with --out."
            )

    def create(self, info: RunInfo) -> None:
        """Create the folder and its first files."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(self.metrics_file, _csv_line([column.name for column in fields(EpochRow)]))
        self._write(self.gates_file, "")
        if info.recipe.subnets is not None:
            self._write(self.subnets_file, _csv_line([column.name for column in fields(SubnetRow)]))
        self._write(self.info_file, to_json(info))

    def info(self) -> RunInfo:
        """Read the run's info.

        Raises:
            AutogateError: there is no run in the folder, or it can't be read.
        """
        if not self.info_file.is_file():
            raise AutogateError("there is no run in this folder: it has no run.json.", where=str(self.path))
        return from_json(RunInfo, self.info_file.read_text(), str(self.info_file))

    def lengthen(self, epochs: int) -> None:
        """Record that the run has so many epochs. What else the recipe says stays."""
        info = self.info()
        recipe = replace(info.recipe, learning=replace(info.recipe.learning, epochs=epochs))
        self._write(self.info_file, to_json(replace(info, recipe=recipe, steps=epochs * info.steps_per_epoch)))

    def metrics(self) -> tuple[EpochRow, ...]:
        """Read the rows of all epochs so far."""
        return _rows(EpochRow, self.metrics_file)

    def subnets(self) -> tuple[SubnetRow, ...]:
        """Read the rows of the subnets after each epoch; none if the run trains one width."""
        return _rows(SubnetRow, self.subnets_file) if self.subnets_file.is_file() else ()

    def subnet_sizes(self) -> tuple[SubnetSize, ...]:
        """Read what the subnets are, the smallest first; none if that isn't known yet."""
        return self._read(tuple[SubnetSize, ...], self.sizes_file)

    def structures(self) -> tuple[Structure, ...]:
        """Read the channels of the subnets, without the largest; none if they aren't found yet."""
        return self._read(tuple[Structure, ...], self.structures_file)

    def _read(self, kind: type[tuple[T, ...]], file: Path) -> tuple[T, ...]:
        return from_json(kind, file.read_text(), str(file)) if file.is_file() else ()

    def of_share(self, share: float) -> RunFolder:
        """The folder of the run that finds the channels of a subnet."""
        return RunFolder(self.path / "find" / f"{share:g}")

    def gates(self) -> tuple[GateRow, ...]:
        """Read the gates after each epoch so far."""
        lines = self.gates_file.read_text().splitlines()
        return tuple(from_json(GateRow, line, str(self.gates_file)) for line in lines)

    def result(self) -> Result | None:
        """Read the result; None if there is none yet."""
        if not self.result_file.is_file():
            return None
        return from_json(Result, self.result_file.read_text(), str(self.result_file))

    def add(self, row: EpochRow, gates: GateRow | None = None) -> None:
        """Append an epoch to the metrics, and to the gates if there are any."""
        with self.metrics_file.open("a", newline="") as lines:
            lines.write(_csv_line(["" if value is None else value for value in asdict(row).values()]))
        if gates is not None:
            with self.gates_file.open("a") as lines:
                lines.write(json.dumps(asdict(gates)) + "\n")

    def add_subnets(self, rows: Sequence[SubnetRow]) -> None:
        """Append an epoch to the rows of the subnets."""
        with self.subnets_file.open("a", newline="") as lines:
            lines.write(_csv_lines(rows))

    def write_structures(self, structures: tuple[Structure, ...]) -> None:
        """Write the channels of the subnets."""
        self._write(self.structures_file, to_json(structures, tuple[Structure, ...]))

    def write_subnet_sizes(self, sizes: Sequence[SubnetSize]) -> None:
        """Write what the subnets are."""
        self._write(self.sizes_file, to_json(tuple(sizes), tuple[SubnetSize, ...]))

    def rewind(self, epoch: int) -> None:
        """Delete the rows of `epoch` and later ones, because these epochs are going to be trained again."""
        if self.subnets_file.is_file():
            rows = [row for row in self.subnets() if row.epoch < epoch]
            header = _csv_line([column.name for column in fields(SubnetRow)])
            self._write(self.subnets_file, header + _csv_lines(rows))
        for file, keep in ((self.metrics_file, epoch + 1), (self.gates_file, epoch)):  # the metrics have a header
            self._write(file, "".join(file.read_text().splitlines(keepends=True)[:keep]))

    def use(self) -> ImageUse | None:
        """Read what the validation images use; None if that isn't known."""
        return from_json(ImageUse, self.use_file.read_text(), str(self.use_file)) if self.use_file.is_file() else None

    def write_use(self, use: ImageUse) -> None:
        """Write what the validation images use."""
        self._write(self.use_file, to_json(use))

    def made_file(self, recipe: Recipe) -> Path:
        """The file of the model that a run makes."""
        if recipe.adaptive is not None:
            return self.adaptive_file
        return self.slim_file if recipe.subnets is None else self.switchable_file

    def finish(self, result: Result) -> None:
        """Write the result."""
        self._write(self.result_file, to_json(result))

    def _write(self, file: Path, text: str) -> None:
        with atomic_write(file) as temporary:
            temporary.write_text(text)


def _rows(kind: type[T], file: Path) -> tuple[T, ...]:
    """The rows of a table, as values."""
    with file.open(newline="") as lines:
        found = [{name: text or None for name, text in row.items()} for row in csv.DictReader(lines)]
    return tuple(from_json(kind, json.dumps(row), str(file)) for row in found)


def _csv_lines(rows: Sequence[SubnetRow]) -> str:
    return "".join(_csv_line(list(asdict(row).values())) for row in rows)


def _csv_line(values: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
