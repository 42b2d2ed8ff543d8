"""The training loop of all methods, and how accuracy is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.accuracy.data import Data, augment, normalise

Report = Callable[[int, float], None]
"""Called after each epoch with its number, from 1, and the loss of its last batch."""


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, one epoch of warm-up (half if there is only one), cosine decay; bfloat16 if fast.

    Attributes:
        epochs: epochs of dense training, and again of what follows it.
        peak: peak learning rate of dense training; half of it afterwards.
        batch: images per batch; the last incomplete batch of an epoch is skipped.
        weight_decay: weight decay of all parameters.
        compiled: whether to use torch.compile.
    """

    epochs: int = 10
    peak: float = 0.1
    batch: int = 128
    weight_decay: float = 5e-4
    compiled: bool = False

    def steps(self, data: Data, epochs: int) -> int:
        """Optimizer steps in this many epochs."""
        return epochs * (len(data.labels) // self.batch)


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster on this device: a processor that emulates it takes twice the time."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def fit(
    model: nn.Module, data: Data, recipe: Recipe, epochs: int, peak: float, report: Report = lambda *_: None,
    after_backward: Callable[[], None] = lambda: None, after_epoch: Callable[[Optimizer], None] = lambda _: None,
    weight_decay: float | None = None,
) -> None:  # fmt: skip
    """Train a model, with one schedule over these epochs.

    Args:
        model: the model; it is trained in place.
        data: the training set.
        recipe: how to train.
        epochs: number of epochs.
        peak: peak learning rate.
        report: called after each epoch.
        after_backward: called in every step after backward.
        after_epoch: called with the optimizer, between two steps.
        weight_decay: replaces the recipe's.
    """
    images, labels = data
    decay = recipe.weight_decay if weight_decay is None else weight_decay
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, weight_decay=decay, nesterov=True)
    steps = recipe.steps(data, epochs)
    warmup = 1 / max(epochs, 2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=warmup, cycle_momentum=False)
    forward = torch.compile(model) if recipe.compiled else model
    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(len(images), device=images.device).split(recipe.batch):
            if len(index) < recipe.batch:
                continue
            with torch.autocast(images.device.type, torch.bfloat16, enabled=has_bfloat16(images.device)):
                loss = F.cross_entropy(forward(normalise(augment(images[index]))), labels[index])
            optimizer.zero_grad()
            loss.backward()
            after_backward()
            optimizer.step()
            schedule.step()
        report(epoch + 1, loss.item())
        after_epoch(optimizer)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch: int = 1000) -> Tensor:
    """Predicted classes, shape (N,), in eval mode and float32."""
    model.eval()
    return torch.cat([model(normalise(part)).argmax(1) for part in images.split(batch)])


@torch.no_grad()
def loss(model: nn.Module, data: Data, batch: int = 1000) -> float:
    """Mean cross entropy in eval mode and float32: a less noisy comparison of two networks than accuracy."""
    model.eval()
    parts = zip(data.images.split(batch), data.labels.split(batch), strict=True)
    total = sum(F.cross_entropy(model(normalise(images)), labels, reduction="sum") for images, labels in parts)
    return float(total) / len(data.labels)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    return float((predicted == labels).float().mean()) * 100
