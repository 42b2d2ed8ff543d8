"""The training loop of all methods, and how networks are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.accuracy.data import Data
from benchmarks.accuracy.setting import Recipe, Setting

Report = Callable[[int, float], None]
"""Called after each epoch with its number, from 1, and the loss of its last batch."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster on this device: a processor that emulates it takes twice the time."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def fit(
    model: nn.Module, data: Data, setting: Setting, epochs: int, peak: float,
    report: Report = lambda *_: None, after_backward: Callable[[], None] = lambda: None,
    after_epoch: Callable[[Optimizer], None] = lambda _: None, weight_decay: float | None = None,
    turns: Callable[[], Iterable[Tensor | None]] = lambda: (None,),
) -> None:  # fmt: skip
    """Train a model, with one schedule over these epochs.

    Args:
        model: the model; it is trained in place.
        data: the training set.
        setting: what the model is trained for, and how.
        epochs: number of epochs.
        peak: peak learning rate.
        report: called after each epoch.
        after_backward: called in every step after backward.
        after_epoch: called with the optimizer, between two steps.
        weight_decay: replaces the recipe's.
        turns: the forwards of a step, whose gradients add up. Each is for the labels (None), or for what the softmax
            of these outputs says.
    """
    (inputs, labels), recipe = data, setting.recipe
    optimizer = _optimizer(model, recipe, peak, recipe.weight_decay if weight_decay is None else weight_decay)
    steps = recipe.steps(data, epochs)
    warmup = 1 / max(epochs, 2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=warmup, cycle_momentum=False)
    forward = torch.compile(model) if recipe.compiled else model
    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(len(inputs), device=inputs.device).split(recipe.batch):
            if len(index) < recipe.batch:
                continue
            varied, wanted = setting.vary(inputs[index], labels[index])
            ready = setting.ready(varied)
            optimizer.zero_grad()
            for teacher in turns():
                with torch.autocast(inputs.device.type, torch.bfloat16, enabled=has_bfloat16(inputs.device)):
                    loss = setting.loss(forward(ready), wanted if teacher is None else teacher.softmax(1))
                loss.backward()
            after_backward()
            optimizer.step()
            schedule.step()
        report(epoch + 1, loss.item())
        after_epoch(optimizer)


def _optimizer(model: nn.Module, recipe: Recipe, peak: float, weight_decay: float) -> Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=weight_decay)
    return torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, weight_decay=weight_decay, nesterov=True)


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, setting: Setting) -> Tensor:
    """What the model answers, in eval mode and float32: `setting.answer` of its outputs."""
    model.eval()
    return torch.cat([setting.answer(model(setting.ready(part))) for part in inputs.split(setting.at_once)])


@torch.no_grad()
def loss(model: nn.Module, data: Data, setting: Setting) -> float:
    """Mean loss in eval mode and float32: a less noisy comparison of two networks than accuracy."""
    model.eval()
    total = 0.0
    for inputs, labels in zip(*(tensor.split(setting.at_once) for tensor in data), strict=True):
        total += float(setting.loss(model(setting.ready(inputs)), labels)) * len(labels)
    return total / len(data.labels)
