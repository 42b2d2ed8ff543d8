"""The parts of a training step: optimizer, schedule, gradient scaler, averaged weights, and the loss."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from autogate.training.recipe import Distillation, Learning, Recipe


def seed_at(*place: int) -> None:
    """Seed all random generators from a place in the run.

    So a resumed run draws the same numbers, in one process or in several, without random number states in the
    checkpoint.

    Args:
        place: the run's seed, process, epoch, batch.
    """
    seed = number_at(*place)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def number_at(*place: int) -> int:
    """A random number for a place in the run, the same each time."""
    return int(np.random.SeedSequence(place).generate_state(1)[0])


class Stepper:
    """Optimizer, schedule, gradient scaler and averaged weights of a model.

    Args:
        model: a model with gates, on its device.
        learning: how to train it.
        steps_per_epoch: optimizer steps in an epoch.
    """

    def __init__(self, model: nn.Module, learning: Learning, steps_per_epoch: int):
        self.learning = learning
        self.device = next(model.parameters()).device
        self.optimizer = create_optimizer_v2(
            model, learning.opt, lr=learning.lr, weight_decay=learning.weight_decay, momentum=learning.momentum
        )
        self._schedule, _ = create_scheduler_v2(
            self.optimizer,
            learning.sched,
            num_epochs=learning.epochs,
            decay_epochs=learning.decay_epochs,
            decay_rate=learning.decay_rate,
            warmup_epochs=learning.warmup_epochs,
            warmup_lr=learning.warmup_lr,
            min_lr=learning.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        scales = learning.amp and learning.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales)
        self.ema = ModelEmaV3(model, decay=learning.model_ema_decay, use_warmup=True) if learning.model_ema else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context of mixed precision, if the recipe asks for it."""
        dtype = getattr(torch, self.learning.amp_dtype)
        return torch.autocast(self.device.type, dtype, enabled=self.learning.amp)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self.scaler.scale(loss).backward()

    def step(self, model: nn.Module, step: int) -> float:
        """Take step number `step`, counted from 1. The gates move with it. Return the learning rate of the step."""
        lr = self.optimizer.param_groups[0]["lr"]
        if self.learning.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(model.parameters(), self.learning.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(model, step)
        self.schedule_to(step)
        return lr

    def schedule_to(self, step: int) -> None:
        """Set the learning rate for the step that comes after `step` steps."""
        if self._schedule is not None and step:
            self._schedule.step_update(step)


@dataclass
class Loss:
    """The loss of a batch.

    Attributes:
        smoothing: label smoothing.
        mixup: mixes images and labels; None for no mixing.
        distillation: weight and temperature of the teacher; None without a teacher.
        teacher: the dense model, frozen.
    """

    smoothing: float
    mixup: Mixup | None
    distillation: Distillation | None = None
    teacher: nn.Module | None = None

    @classmethod
    def of(cls, recipe: Recipe, num_classes: int, teacher: nn.Module | None) -> Loss:
        """The loss that a recipe asks for."""
        images, smoothing = recipe.images, recipe.learning.smoothing
        mixup = Mixup(images.mixup, images.cutmix, label_smoothing=smoothing, num_classes=num_classes)
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        return cls(smoothing, mixup if images.mixes else None, recipe.distillation, teacher)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of images (N, C, H, W) with labels (N,). The images may be mixed in place."""
        images, labels = self.mixed(images, labels)
        wanted = None
        logits = model(images)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(images)
        return self.of_outputs(logits, labels, wanted)

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The images, mixed in place if the recipe says so, and labels, which then are shares of classes."""
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

    def of_outputs(self, logits: Tensor, labels: Tensor, wanted: Tensor | None) -> Tensor:
        """The mean loss of outputs.

        Args:
            logits: shape (N, classes).
            labels: of mixed images.
            wanted: what a teacher answers; None without one.
        """
        loss = F.cross_entropy(logits, labels, label_smoothing=0.0 if self.mixup is not None else self.smoothing)
        if self.distillation is None or wanted is None:
            return loss
        weight = self.distillation.weight
        return (1 - weight) * loss + weight * distance(logits, wanted, self.distillation.temperature)


def distance(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """The teacher's part of the loss: KL divergence at a temperature, times the squared temperature.

    See Hinton et al., "Distilling the Knowledge in a Neural Network", section 2.

    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> float(distance(logits, logits, 2.0))
    0.0
    """
    student, teacher = ((x.float() / temperature).log_softmax(-1) for x in (logits, wanted))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


@torch.no_grad()
def accuracy(model: nn.Module, batches: Any, most: int | None = None, stop: Any = None) -> tuple[int, int]:
    """Count the images that a model classifies correctly (top 1) in eval mode.

    Args:
        model: the model; its mode is restored afterwards.
        batches: batches of images and labels, on the model's device.
        most: number of images that count; None to count all.
        stop: called before each batch.

    Returns:
        The number of correct images, and of all images counted.
    """
    training, right, seen = model.training, 0, 0
    model.eval()
    for images, labels in batches:
        if stop is not None:
            stop()
        hits = (model(images).argmax(-1) == labels)[: None if most is None else most - seen]
        right, seen = right + int(hits.sum()), seen + len(hits)
    model.train(training)
    return right, seen
