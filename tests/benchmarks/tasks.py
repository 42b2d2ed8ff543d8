"""A small task for the methods of the accuracy benchmark: a ResNet-8 on images of noise."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from benchmarks.accuracy.data import Data, normalise
from benchmarks.accuracy.methods import Task
from benchmarks.accuracy.models import ResNet
from benchmarks.accuracy.recipe import fit
from benchmarks.accuracy.setting import Recipe, Setting
from benchmarks.accuracy.settings import CIFAR


@dataclass
class Tried:
    """A task, and what a method did with it.

    Attributes:
        model: a ResNet-8.
        data: what it is trained on.
        setting: after three dense epochs, four for the method.
        epochs: of each training.
        optimizers: of each epoch.
    """

    model: nn.Module
    data: Data
    setting: Setting
    epochs: list[int] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)

    def task(self, flops: float) -> Task:
        def training(model: nn.Module, epochs: int, peak: Any = None, after_epoch: Any = None, **others: Any) -> None:
            def both(optimizer: Optimizer) -> None:
                if after_epoch is not None:
                    after_epoch(optimizer)
                self.optimizers.append(optimizer)

            self.epochs.append(epochs)
            fit(model, self.data, self.setting, epochs, 0.01, after_epoch=both, **others)

        batches = [(normalise(self.data.inputs[:32]), self.data.labels[:32])]
        recipe = self.setting.recipe
        steps = recipe.steps(self.data, recipe.epochs)
        example = torch.randn(2, 3, 32, 32)
        return Task(flops, recipe, steps, example, batches, F.cross_entropy, ("fc",), training)


def tried() -> Tried:
    torch.manual_seed(0)
    data = Data(torch.randint(0, 255, (64, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (64,)))
    return Tried(ResNet(8), data, replace(CIFAR["resnet20"], recipe=Recipe(epochs=4, dense_epochs=3, batch=8)))
