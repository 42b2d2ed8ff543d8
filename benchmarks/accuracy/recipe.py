"""The training loop that all methods go through, and what accuracy means."""

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
    """SGD with Nesterov momentum, an epoch of warm-up (or half of a single one), cosine decay; bfloat16 if it is fast.

    Attributes:
        epochs: of the dense training, and again of what comes after it.
        peak: highest learning rate of the dense training; half of it afterwards.
        batch: images; the last incomplete batch of an epoch is left out.
        weight_decay: of everything.
        compiled: run through torch.compile.
    """

    epochs: int = 10
    peak: float = 0.1
    batch: int = 128
    weight_decay: float = 5e-4
    compiled: bool = False

    def steps(self, data: Data, epochs: int) -> int:
        """Optimizer steps in so many epochs."""
        return epochs * (len(data.labels) // self.batch)


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is the faster way there: on a processor that has to emulate it, it takes twice the time."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def fit(
    model: nn.Module, data: Data, recipe: Recipe, epochs: int, peak: float, report: Report = lambda *_: None,
    after_backward: Callable[[], None] = lambda: None, after_epoch: Callable[[Optimizer], None] = lambda _: None,
    weight_decay: float | None = None,
) -> None:  # fmt: skip
    """Trains a model, with a schedule of its own over these epochs.

    Args:
        model: it is trained in place.
        data: the training set.
        recipe: how.
        epochs: how long.
        peak: highest learning rate.
        report: called after each epoch.
        after_backward: called in every step when the gradients are there.
        after_epoch: called with the optimizer, between two steps.
        weight_decay: if not the recipe's.
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
    """Mean cross entropy, in eval mode and float32: it tells two networks apart with less noise than accuracy."""
    model.eval()
    parts = zip(data.images.split(batch), data.labels.split(batch), strict=True)
    total = sum(F.cross_entropy(model(normalise(images)), labels, reduction="sum") for images, labels in parts)
    return float(total) / len(data.labels)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """In percent."""
    return float((predicted == labels).float().mean()) * 100
