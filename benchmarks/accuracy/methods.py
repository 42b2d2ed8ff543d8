"""The methods that are compared. Each takes a trained model and returns a slim one, with the same number of epochs.

Torch-Pruning's methods have the settings of its own CIFAR scripts (reproduce/main.py and readme.md of v1.6.1): steps of
a 400th of the channels, ranked over all layers, until the FLOPs are met; sparse training without weight decay, with a
regularization of 5e-4 for group sparsity and 1e-5 for batch norms' scales. Half of the epochs are sparse training, half
fine-tuning. The scripts have a schedule for each; here one schedule covers both, which does better in so few epochs
(docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.optim import Optimizer

import autogate
from autogate.methods import GDP
from benchmarks.accuracy.data import layout


class Fit(Protocol):
    """Train a model in place: `recipe.fit` with all other arguments bound."""

    def __call__(
        self, model: nn.Module, epochs: int, *, after_backward: Callable[[], None] = ...,
        after_epoch: Callable[[Optimizer], None] = ..., weight_decay: float = ...,
    ) -> None: ...  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a method has to do.

    Attributes:
        flops: share of the FLOPs to keep.
        epochs: epochs of training that it may use.
        steps: optimizer steps in these epochs.
        weight_decay: weight decay of the recipe.
        example: images (N, 3, 32, 32), normalised.
        fit: trains for a number of epochs.
        method: the method of a run with gates.
    """

    flops: float
    epochs: int
    steps: int
    weight_decay: float
    example: Tensor
    fit: Fit
    method: GDP = field(default_factory=GDP)


Method = Callable[[nn.Module, Task], nn.Module]


def count_flops(model: nn.Module, example: Tensor) -> float:
    """Multiply-adds of convolutions and linear layers for one image, counted the same way for all methods."""
    counter = FlopCountAnalysis(model.eval(), example[:1]).unsupported_ops_warnings(False)
    by_operator = counter.by_operator()
    return float(by_operator["conv"] + by_operator["linear"])


def dense(model: nn.Module, task: Task) -> nn.Module:
    """Dense training for the same additional epochs: the baseline."""
    task.fit(model, task.epochs)
    return model


def autogate_gates(model: nn.Module, task: Task, **settings: Any) -> nn.Module:
    """`autogate.prepare` with its defaults, training, `autogate.finalize` once the targets are met, more training."""
    model = autogate.prepare(model, task.example, flops=task.flops, steps=task.steps, method=task.method, **settings)
    gated = True

    def slim(optimizer: Optimizer | None = None) -> None:
        nonlocal gated
        if gated and (optimizer is None or autogate.gates(model).progress().settled):
            autogate.finalize(model, optimizer=optimizer)
            gated = False

    task.fit(model, task.epochs, after_epoch=slim)
    slim()
    return model


def l1(model: nn.Module, task: Task) -> nn.Module:
    """Remove the channels with the smallest L1 norms, ranked over all layers, at once; then fine-tune."""
    import torch_pruning

    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    _prune(_pruner(torch_pruning.pruner.MagnitudePruner, model, task, importance), model, task)
    task.fit(model, task.epochs)
    return model


def bn_slimming(model: nn.Module, task: Task) -> nn.Module:
    """Sparse training of batch norms' scales (Liu et al., Network Slimming), then fine-tuning."""
    import torch_pruning

    importance = torch_pruning.importance.BNScaleImportance()
    pruner = _pruner(torch_pruning.pruner.BNScalePruner, model, task, importance, reg=1e-5)
    return _sparse_then_fine(pruner, model, task)


def group_sparsity(model: nn.Module, task: Task) -> nn.Module:
    """Sparse training of all kernels coupled in a class (Fang et al., DepGraph), then fine-tuning."""
    import torch_pruning

    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer="max")
    pruner = _pruner(torch_pruning.pruner.GroupNormPruner, model, task, importance, reg=5e-4)
    return _sparse_then_fine(pruner, model, task)


def _pruner(kind: Any, model: nn.Module, task: Task, importance: Any, **settings: Any) -> Any:
    return kind(
        model, task.example, importance=importance, global_pruning=True, iterative_steps=400, pruning_ratio=1.0,
        ignored_layers=[layer for layer in model.modules() if isinstance(layer, nn.Linear)], **settings,
    )  # fmt: skip


def _sparse_then_fine(pruner: Any, model: nn.Module, task: Task) -> nn.Module:
    sparse, done = max(1, task.epochs // 2), 0

    def regularize() -> None:
        if done < sparse:
            pruner.regularize(model)

    def prune(optimizer: Optimizer) -> None:
        nonlocal done
        done += 1
        if done == sparse:
            _prune(pruner, model, task)
            (group,) = optimizer.param_groups
            group["params"], group["weight_decay"] = list(model.parameters()), task.weight_decay
            optimizer.state.clear()

    task.fit(model, task.epochs, after_backward=regularize, after_epoch=prune, weight_decay=0.0)
    return model


def _prune(pruner: Any, model: nn.Module, task: Task) -> None:
    """Remove a 400th of the channels at a time until the FLOPs are met."""
    model.zero_grad(set_to_none=True)
    whole = count_flops(model, task.example)
    while count_flops(model, task.example) > task.flops * whole and pruner.current_step < pruner.iterative_steps:
        pruner.step()
    model.to(memory_format=layout(task.example.device))


METHODS: dict[str, Method] = {
    "dense": dense,
    "autogate": autogate_gates,
    "autogate, conv shortcuts": partial(autogate_gates, shortcuts="conv"),
    "l1": l1,
    "bn slimming": bn_slimming,
    "group sparsity": group_sparsity,
}
