"""A run with gates: they are learned by the epochs, and the slim model is made of what is left.

The loop treats gates as any other loop does: the model is prepared before it, and finalized between two epochs once the
targets are met, or else at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from autogate.api import gated_summary, gates
from autogate.budget import Flops
from autogate.files import save
from autogate.training.callbacks import StepMetrics
from autogate.training.checkpoint import Checkpoint, Position
from autogate.training.data import DataSets, Loaders, loaders
from autogate.training.distributed import World
from autogate.training.epochs import Epochs, Stop
from autogate.training.finalize_run import FinalGates, Snapshot, finalize_run, finalize_run_again
from autogate.training.learning import Loss, Stepper
from autogate.training.network import data_config, note_data_config, outputs_of, with_gates
from autogate.training.recipe import Recipe
from autogate.training.run_folder import EpochRow, LayerSize, Result, RunFolder, RunInfo
from autogate.version import __version__
from rewriters import AutogateError


@dataclass
class Loop(Epochs):
    """A run with gates in memory.

    Attributes:
        flops: tells the share of the FLOPs that is left.
        final_gates: the gates when the model was finalized; None while it has gates.
    """

    flops: Flops
    final_gates: FinalGates | None = None

    @classmethod
    def prepare(
        cls, recipe: Recipe, data: DataSets, model: nn.Module, teacher: nn.Module | None, folder: RunFolder,
        world: World,
    ) -> Loop:  # fmt: skip
        """Prepare a model, and everything else for a run that has not started."""
        config, classes = config_for(recipe, data, model)
        loading = loaders(data, recipe.images, config, world)
        size, per_epoch = tuple(config["input_size"]), steps_per_epoch(recipe, loading)
        steps = recipe.learning.epochs * per_epoch
        model = with_gates(model, recipe.budget, size, steps, per_epoch, recipe.method)
        info = info_of(recipe, data, loading, world, sizes_of(model), classes, tuple(config["input_size"]))
        stepper = Stepper(model, recipe.learning, info.steps_per_epoch)
        bank = gates(model)
        flops = Flops(bank.channel_map, model, bank.added)
        return cls(recipe, info, folder, world, loading, model, stepper, Loss.of(recipe, classes, teacher), flops)

    def load_parts(self, found: Checkpoint) -> None:
        if found.gates is not None:
            self.final_gates = finalize_run_again(
                self.model, found.gates, found.slimmings, self.average, self.stepper.optimizer
            )
        super().load_parts(found)
        if self.final_gates is None and found.position.step >= found.info.steps < self.info.steps:
            gates(self.model).settled.zero_()  # the steps were over, and now there are more

    def before_epoch(self) -> bool:
        if self.final_gates is not None or not self._may_finalize():
            return False
        self.final_gates = finalize_run(self.model, self.average, self.stepper.optimizer)
        return True

    def _may_finalize(self) -> bool:
        """Whether the targets are met: the gates have nothing left to learn, and training costs less without them."""
        return gates(self.model).progress().settled

    def metrics(self, epoch: int, step: int, loss: float, lr: float) -> StepMetrics:
        if self.final_gates is None:
            live = gates(self.model).live.cpu()
            share, count = self.flops.share(live), int(live.sum())
        else:
            share, count = self.final_gates.snapshot.flops / self.info.flops, self.final_gates.snapshot.live
        return StepMetrics(epoch, step, loss, lr, share, count)

    def checkpoint(self, position: Position) -> Checkpoint:
        final = self.final_gates
        return Checkpoint(
            self.info, position, *self.states(), None if final is None else final.bank_state,
            () if final is None else final.slimmings,
        )  # fmt: skip

    def evaluate(self, position: Position, stop: Stop) -> EpochRow:
        now = Snapshot.of(self.model) if self.final_gates is None else self.final_gates.snapshot
        row = self.row(
            position,
            accuracy=self.accuracy(self.model, stop),
            ema_accuracy=None if self.average is None else self.accuracy(self.average, stop),
            flops=now.flops / self.info.flops,
            params=now.params / self.info.params,
            live=now.live,
            gates=self.info.gates,
            settled=now.settled,
        )
        if self.world.main:
            self.folder.add(row, now.gate_row(row))
        return row

    def finish(self, row: EpochRow) -> Result:
        """Finalize the model if it still has gates, evaluate the slim model and save it."""
        if self.final_gates is None:
            self.final_gates = finalize_run(self.model, self.average, warn=self.world.main)
        slim = (self.model if self.average is None else self.average).eval()
        result = replace(
            self.final_gates.snapshot.result(slim, self.info, row.step), accuracy=self.accuracy(slim, lambda: False)
        )
        if self.world.main:
            save(slim, self.folder.slim_file)
            self.folder.finish(result)
        self.world.wait()
        return result


def config_for(recipe: Recipe, data: DataSets, model: nn.Module) -> tuple[dict[str, Any], int]:
    """How images become inputs of a model, which is noted on it, and the number of its outputs.

    Raises:
        AutogateError: the data has more classes than the model has outputs.
    """
    config = data_config(model, recipe.network)
    classes = outputs_of(model, tuple(config["input_size"]))
    if data.num_classes is not None and classes < data.num_classes:
        raise AutogateError(
            f"the model has {classes} outputs, but the data has {data.num_classes} classes.",
            where="num_classes",
            remedy="Omit --num-classes, or give at least as many as the data has.",
        )
    note_data_config(model, config, data.class_names or (), classes)
    return config, classes


def steps_per_epoch(recipe: Recipe, loading: Loaders) -> int:
    """Optimizer steps of an epoch."""
    return math.ceil(len(loading.train) / recipe.learning.grad_accum_steps)


class Sizes(NamedTuple):
    """What `RunInfo` says of the model: gates, targets, FLOPs, parameters and layers."""

    gates: int
    targets: Mapping[str, float]
    flops: float
    params: int
    layers: tuple[LayerSize, ...]


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of a model with gates."""
    whole = gated_summary(model)
    assert whole.progress is not None  # it has gates
    layers = tuple(
        LayerSize(layer.module, layer.all_inputs, layer.all_outputs, layer.all_macs) for layer in whole.layers
    )
    return Sizes(whole.progress.classes, whole.progress.targets, whole.all_flops, whole.all_params, layers)


def info_of(
    recipe: Recipe, data: DataSets, loading: Loaders, world: World, sizes: Sizes, classes: int,
    input_size: tuple[int, int, int],
) -> RunInfo:  # fmt: skip
    """The content of run.json: the recipe, and what it means for this model and this data."""
    per_epoch = steps_per_epoch(recipe, loading)
    return RunInfo(
        format=1,
        versions={"autogate": __version__, "torch": torch.__version__, "timm": timm.__version__},
        recipe=recipe,
        num_classes=classes,
        class_names=data.class_names or (),
        input_size=input_size,
        train_images=len(data.train),
        val_images=len(data.val),
        processes=world.size,
        batches=len(loading.train),
        steps_per_epoch=per_epoch,
        steps=recipe.learning.epochs * per_epoch,
        **sizes._asdict(),
    )
