"""The methods that are compared. Each takes a trained model and returns a slim one, with the same number of epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.optim import Optimizer

import autogate
from autogate.methods import GDP
from autogate.methods import Method as Learning
from benchmarks.accuracy.setting import Recipe


class Fit(Protocol):
    """Train a model in place: `recipe.fit` with all other arguments bound, at half of the recipe's peak by default."""

    def __call__(
        self, model: nn.Module, epochs: int, peak: float | None = None, *, after_backward: Callable[[], None] = ...,
        after_epoch: Callable[[Optimizer], None] = ..., weight_decay: float = ...,
    ) -> None: ...  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a method has to do.

    Attributes:
        flops: share of the FLOPs to keep.
        recipe: how many epochs it may use, and how it trains.
        steps: optimizer steps in these epochs.
        example: two inputs of the network.
        batches: some batches of inputs and labels, for criteria.
        loss: of outputs and labels.
        heads: paths of the layers that make the outputs.
        fit: trains for a number of epochs.
        method: the method of a run with gates.
    """

    flops: float
    recipe: Recipe
    steps: int
    example: Tensor
    batches: Sequence[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    heads: Sequence[str]
    fit: Fit
    method: Learning = field(default_factory=GDP)


Method = Callable[[nn.Module, Task], nn.Module]


def count_flops(model: nn.Module, example: Tensor) -> float:
    """Multiply-adds of convolutions and linear layers for one sample, counted the same way for all methods."""
    counter = FlopCountAnalysis(model.eval(), example[:1]).unsupported_ops_warnings(False)
    by_operator = counter.by_operator()
    return float(by_operator["conv"] + by_operator["linear"])


def dense(model: nn.Module, task: Task) -> nn.Module:
    """Dense training for the same additional epochs: the baseline."""
    task.fit(model, task.recipe.epochs)
    return model


def gates(model: nn.Module, task: Task, **settings: Any) -> nn.Module:
    """`autogate.prepare` with its defaults, training, `autogate.finalize` once the targets are met, more training."""
    settings = {"method": task.method, **settings}
    model = autogate.prepare(model, task.example, flops=task.flops, steps=task.steps, **settings)
    gated = True

    def slim(optimizer: Optimizer | None = None) -> None:
        nonlocal gated
        if gated and (optimizer is None or autogate.gates(model).progress().settled):
            autogate.finalize(model, optimizer=optimizer)
            gated = False

    task.fit(model, task.recipe.epochs, after_epoch=slim)
    slim()
    return model


def published(model: nn.Module, task: Task) -> nn.Module:
    """GDP to the letter of its paper, but for lambda, which is steered: fixed, it would meet no budget."""
    epochs = task.recipe.epochs
    letter = GDP.published(lam=1, epochs=epochs, steps_per_epoch=max(1, task.steps // epochs))
    return gates(model, task, method=replace(letter, lam=None))


def criterion(model: nn.Module, task: Task, by: str) -> nn.Module:
    """Close gates at once by a criterion, then fine-tune."""
    model = autogate.prepare(model, task.example, flops=task.flops)
    autogate.close(model, by, batches=task.batches, loss=task.loss)
    model = autogate.finalize(model)
    task.fit(model, task.recipe.epochs)
    return model


def scratch(model: nn.Module, task: Task) -> nn.Module:
    """The widths that gates choose, trained from scratch for as long as dense training and slimming took together."""
    model = gates(model, task)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    task.fit(model, task.recipe.first_epochs + task.recipe.epochs, task.recipe.peak)
    return model


OURS: dict[str, Method] = {
    "autogate": gates,
    "autogate, conv shortcuts": partial(gates, shortcuts="conv"),
    "autogate, published GDP": published,
    "autogate, clipped Lasso": partial(gates, method=autogate.ClippedLasso(a=0.3)),
    "autogate, L1 at once": partial(criterion, by="l1"),
    "autogate, Taylor at once": partial(criterion, by="taylor"),
}
