"""A run of a model that chooses its channels for each image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autogate import adaptive
from autogate.files import data_config_of, save
from autogate.inspection import summarise_adaptive
from autogate.training.callbacks import StepMetrics
from autogate.training.checkpoint import Checkpoint, Position
from autogate.training.data import DataSets, loaders, on_device
from autogate.training.distributed import World
from autogate.training.epochs import Epochs, Stop
from autogate.training.image_use import ImageUse, write_row
from autogate.training.learning import Loss, Stepper
from autogate.training.loop import Sizes, config_for, info_of, steps_per_epoch
from autogate.training.recipe import Choice, Recipe
from autogate.training.run_folder import EpochRow, LayerSize, Result, RunFolder, RunInfo
from rewriters import AutogateError

SHOWN = 8
"""How many of the cheapest and of the dearest images a run keeps."""

CLOSE = 0.01
"""How far from the budget the mean cost may be for the budget to be met."""


@dataclass
class AdaptiveLoop(Epochs):
    """A run of an adaptive model in memory."""

    config: dict[str, Any]

    @classmethod
    def prepare(
        cls, recipe: Recipe, data: DataSets, model: nn.Module, teacher: nn.Module | None, folder: RunFolder,
        world: World,
    ) -> AdaptiveLoop:  # fmt: skip
        """Give the model its saliency modules, and make everything else for a run that has not started."""
        config, classes = config_for(recipe, data, model)
        loading, size = loaders(data, recipe.images, config, world), tuple(config["input_size"])
        steps = recipe.learning.epochs * steps_per_epoch(recipe, loading)
        model = with_choice(model, recipe, size, steps)
        info = info_of(recipe, data, loading, world, _sizes(model), classes, size)
        stepper = Stepper(model, recipe.learning, info.steps_per_epoch)
        return cls(recipe, info, folder, world, loading, model, stepper, Loss.of(recipe, classes, teacher), config)

    def metrics(self, epoch: int, step: int, loss: float, lr: float) -> StepMetrics:
        return StepMetrics(epoch, step, loss, lr, mean_cost(self.model), 0)

    def checkpoint(self, position: Position) -> Checkpoint:
        return Checkpoint(self.info, position, *self.states(), None)

    def evaluate(self, position: Position, stop: Stop) -> EpochRow:
        share, target = mean_cost(self.model), self.info.targets["FLOPs"]
        row = self.row(
            position,
            accuracy=self.accuracy(self.model, stop),
            ema_accuracy=None if self.average is None else self.accuracy(self.average, stop),
            flops=share,
            params=1.0,
            live=0,
            gates=0,
            settled=share <= target + CLOSE,
        )
        if self.world.main:
            self.folder.add(row)
        return row

    def finish(self, row: EpochRow) -> Result:
        """Measure what the validation images use, and save the model."""
        model = (self.model if self.average is None else self.average).eval()
        with self.stepper.autocast():
            found = adaptive.use(model, self._images())
        shares = tuple(round(share, 5) for share in found.shares.tolist())
        use = ImageUse(found.layers, shares, tuple(found.channels.tolist()))
        result = result_of(model, self.info, row.step, use.mean)
        result = replace(result, accuracy=self.accuracy(model, lambda: False))
        if self.world.main:
            save(model, self.folder.adaptive_file)
            self.folder.write_use(use)
            shown = self._shown(found.shares.argsort().tolist())
            for file, images in zip(self.folder.picture_files, shown, strict=True):
                write_row(images, file)
            self.folder.finish(result)
        self.world.wait()
        return result

    def _images(self) -> Iterator[Tensor]:
        """The validation images; of several processes, this one's."""
        left = self.loaders.val_share
        for images, _ in on_device(self.loaders.val, self.world.device):
            taken = images if left is None else images[:left]
            if len(taken):
                yield taken
            left = None if left is None else left - len(taken)

    def _shown(self, order: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """The cheapest images, the cheapest first, and the dearest, the dearest first, with values in [0, 1].

        Args:
            order: numbers of the images in the order of their costs.
        """
        mean, std = (torch.tensor(self.config[name]).view(-1, 1, 1) for name in ("mean", "std"))
        wanted, first = {*order[:SHOWN], *order[-SHOWN:]}, 0
        found: dict[int, Tensor] = {}
        for images in self._images():
            for number in sorted(wanted & set(range(first, first + len(images)))):
                found[number] = (images[number - first].float().cpu() * std + mean).clamp(0, 1)
            first += len(images)
        return [found[number] for number in order[:SHOWN]], [found[number] for number in order[: -SHOWN - 1 : -1]]


def with_choice(model: nn.Module, recipe: Recipe, input_size: tuple[int, int, int], steps: int) -> nn.Module:
    """Prepare a model for its budget.

    Args:
        model: the dense model, on the device that it is trained on.
        recipe: of a run with a choice for each image.
        input_size: channels, height and width of an image.
        steps: number of optimizer steps that it is going to be trained for.
    """
    budget, choice = recipe.budget, recipe.adaptive
    assert choice is not None and budget.flops is not None  # `check_choice` has looked
    images = torch.randn(2, *input_size, device=next(model.parameters()).device)
    return adaptive.prepare(
        model, images, flops=budget.flops, steps=steps, warmup=choice.warmup, ignore=budget.ignore
    )  # fmt: skip


def mean_cost(model: nn.Module) -> float:
    """The share of the FLOPs that an image takes, a running mean over the training so far; 1 before it."""
    return float(adaptive.bank(model).cost) or 1.0


def result_of(model: nn.Module, info: RunInfo, step: int, share: float) -> Result:
    """The result of a run after `step` steps, if an image takes this share of the FLOPs; without an accuracy."""
    params = sum(parameter.numel() for parameter in model.parameters())
    return Result(
        step, info.steps, share * info.flops, params, info.flops, info.params, {"FLOPs": share},
        data_config=data_config_of(model),
    )  # fmt: skip


def check_choice(recipe: Recipe, choice: Choice) -> None:
    """Raise if a recipe asks for what a run with a choice for each image can't do."""
    budget = recipe.budget
    given = {
        "params": budget.params, "activations": budget.activations, "latency": budget.latency,
        "limit": budget.limits or None, "round-to": None if budget.round_to == 1 else budget.round_to,
        "shortcuts": None if budget.shortcuts == "shared" else budget.shortcuts, "subnets": recipe.subnets,
    }  # fmt: skip
    odd = [f"--{name}" for name, value in given.items() if value is not None]
    if odd:
        raise AutogateError(f"with a choice for each image there is no {odd[0]}.", where="adaptive", remedy="Omit it.")
    if budget.flops is None or not 0 < budget.flops < 1:
        raise AutogateError(
            f"its budget is flops={budget.flops}; it must be in (0, 1).", where="adaptive", remedy="Give --flops 0.35."
        )


def _sizes(model: nn.Module) -> Sizes:
    bank = adaptive.bank(model)
    found = summarise_adaptive(model, bank)
    layers = tuple(
        LayerSize(layer.path, len(layer.inputs), len(layer.outputs), layer.positions * layer.dense)
        for layer in bank.counting.layers
    )
    return Sizes(0, {"FLOPs": bank.run.flops}, found.all_flops, found.params, layers)
