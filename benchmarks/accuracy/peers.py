"""Torch-Pruning's methods, with the settings of its own CIFAR scripts (reproduce/main.py and readme.md of v1.6.1).

Steps of a 400th of the channels, ranked over all layers, until the FLOPs are met; sparse training without weight decay,
with a regularization of 5e-4 for group sparsity and 1e-5 for batch norms' scales. Half of the epochs are sparse
training, half fine-tuning. The scripts have a schedule for each; here one schedule covers both, which does better in so
few epochs (docs/benchmarks.md).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from benchmarks.accuracy.data import layout
from benchmarks.accuracy.methods import Method, Task, count_flops


def at_once(model: nn.Module, task: Task, importance: str, isomorphic: bool = False, **settings: Any) -> nn.Module:
    """Remove the channels that score lowest over all layers (isomorphic: over layers of one kind), then fine-tune."""
    import torch_pruning

    score = getattr(torch_pruning.importance, importance)(**settings)
    pruner = _pruner(torch_pruning.pruner.BasePruner, model, task, score, isomorphic=isomorphic)
    if "Taylor" in importance:
        for inputs, labels in task.batches:
            task.loss(model(inputs), labels).backward()
    _prune(pruner, model, task)
    task.fit(model, task.recipe.epochs)
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
        ignored_layers=[model.get_submodule(path) for path in task.heads], **settings,
    )  # fmt: skip


def _sparse_then_fine(pruner: Any, model: nn.Module, task: Task) -> nn.Module:
    sparse, done = max(1, task.recipe.epochs // 2), 0

    def regularize() -> None:
        if done < sparse:
            pruner.regularize(model)

    def prune(optimizer: Optimizer) -> None:
        nonlocal done
        done += 1
        if done == sparse:
            _prune(pruner, model, task)
            (group,) = optimizer.param_groups
            group["params"], group["weight_decay"] = list(model.parameters()), task.recipe.weight_decay
            optimizer.state.clear()

    task.fit(model, task.recipe.epochs, after_backward=regularize, after_epoch=prune, weight_decay=0.0)
    return model


def _prune(pruner: Any, model: nn.Module, task: Task) -> None:
    """Remove a 400th of the channels at a time until the FLOPs are met."""
    whole = count_flops(model, task.example)
    while count_flops(model, task.example) > task.flops * whole and pruner.current_step < pruner.iterative_steps:
        pruner.step()
    model.zero_grad(set_to_none=True)
    model.to(memory_format=layout(task.example.device))


PEERS: dict[str, Method] = {
    "Torch-Pruning, L1": partial(at_once, importance="MagnitudeImportance", p=1),
    "Torch-Pruning, Taylor": partial(at_once, importance="TaylorImportance"),
    "Torch-Pruning, isomorphic": partial(at_once, importance="TaylorImportance", isomorphic=True),
    "Torch-Pruning, slimming": bn_slimming,
    "Torch-Pruning, group sparsity": group_sparsity,
}
