"""A small training run, and callbacks that note it or stop it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from autogate.training import Budget, Callback, Distillation, EpochRow, Images, Learning, Network, Recipe, StepMetrics


def recipe(pictures: Path, **changes: Any) -> Recipe:
    """Two epochs of three steps of a small network."""
    plain: dict[str, Any] = {
        "network": Network("test_resnet", img_size=32),
        "images": Images(str(pictures), batch_size=8, workers=0),
        "budget": Budget(flops=0.7),
        "learning": Learning(epochs=2),
        "device": "cpu",
    }
    return Recipe(**{**plain, **changes})


class Diary(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[EpochRow] = []
        self.moments: list[StepMetrics] = []
        self.ended = 0

    def stepped(self, metrics: StepMetrics) -> None:
        self.moments.append(metrics)

    def evaluated(self, row: EpochRow) -> None:
        self.rows.append(row)

    def finished(self) -> None:
        self.ended += 1


class After(Callback):
    """Stops a run after so many steps."""

    def __init__(self, steps: int):
        self.left, self.training = steps, False

    def evaluated(self, row: EpochRow) -> None:
        self.training = True

    def __call__(self) -> bool:
        self.left -= self.training
        return self.left <= 0


class InEpoch(Callback):
    """Stops a run after the first step of an epoch."""

    def __init__(self, epoch: int):
        self.epoch, self.now = epoch, -1

    def evaluated(self, row: EpochRow) -> None:
        self.now = row.epoch + 1

    def __call__(self) -> bool:
        return self.now == self.epoch


def everything(images: Images) -> dict[str, Any]:
    """A run of all that a checkpoint has to know of."""
    return {
        "images": dataclasses.replace(images, batch_size=4, mixup=0.5, cutmix=0.5),
        "network": Network("test_resnet", img_size=32, drop=0.2, drop_path=0.1),
        "learning": Learning(
            epochs=2, opt="adamw", lr=1e-3, warmup_epochs=1, grad_accum_steps=2, clip_grad=1.0, smoothing=0.1,
            amp=True, model_ema=True,
        ),
        "distillation": Distillation(0.5, 3.0),
    }  # fmt: skip
