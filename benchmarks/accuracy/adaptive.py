"""A choice of channels for each image, and its variants (Chen et al., "Self-Adaptive Network Pruning", section 5.1).

Each variant changes one thing. FLOPs are counted alike: the mean over images of what their channels cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import autogate
from autogate.adaptive import SANP
from autogate.saliency import SaliencyModule
from benchmarks.accuracy.methods import Method, Task

HALVINGS = 8
"""How often the interval is halved in which k is looked for."""


class FixedKModule(SaliencyModule):
    """FIXED K: the k channels with the highest scores are computed, in place of a binarized score.

    As in feature boosting and suppression (Gao et al., 2019), scores aren't negative.

    Attributes:
        k: how many.
    """

    k: int

    def forward(self, x: Tensor) -> Tensor:
        """The scores of the k channels, positive, and minus infinity for all others."""
        scores = super().forward(x).clamp(min=torch.finfo(x.dtype).tiny)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(self.k).indices, True)
        return scores.where(chosen, -torch.inf)

    def code(self, scores: Tensor) -> Tensor:
        """1 for the k channels. Nothing learns from it: gradients go to their scores alone."""
        return self.notes.code(self.layer, scores)


class StaticModule(SaliencyModule):
    """STATIC: scores come from a vector of ones in place of the image, so all images get the same channels."""

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(self.layout.means(x))
        return super().forward(self.layout.broadcast(ones, ones))

    @torch.no_grad()
    def settle(self) -> None:
        """Become a `SaliencyModule` whose bias has these scores: it can lose the channels that aren't used."""
        ones = self.reduce.weight.new_ones(1, self.reduce.in_features)
        ones = self.layout.broadcast(ones, ones)
        self.expand.bias.copy_(self(ones)[0] - 1)
        self.expand.weight.zero_()
        self.__class__ = SaliencyModule


def adaptive(model: nn.Module, task: Task) -> nn.Module:
    """`autogate.adaptive.prepare` with its defaults, training, `autogate.adaptive.finalize`."""
    model = autogate.adaptive.prepare(model, task.example, flops=task.flops, steps=task.steps)
    task.fit(model, task.recipe.epochs)
    return finalized(model, task)


def static(model: nn.Module, task: Task) -> nn.Module:
    """The same with STATIC's modules."""
    model = autogate.adaptive.prepare(model, task.example, flops=task.flops, steps=task.steps)
    become(model, StaticModule)
    task.fit(model, task.recipe.epochs)
    for module in autogate.adaptive.bank(model).saliency_modules:
        module.settle()
    return finalized(model, task)


def fixed_k(model: nn.Module, task: Task) -> nn.Module:
    """The same with FIXED K's modules. One share of the channels for all layers, so that the FLOPs are met."""
    method = SANP(sharpness=1.0, trim=0.0)  # scores of k channels are positive, and the threshold stays at zero
    model = autogate.adaptive.prepare(model, task.example, flops=task.flops, steps=task.steps, method=method)
    images = [inputs for inputs, _ in task.batches]
    become(model, FixedKModule)
    for module in autogate.adaptive.bank(model).saliency_modules:
        module.expand.reset_parameters()  # so that there are highest scores from the start
    fit_k(model, task.flops, images)

    def again(optimizer: Optimizer) -> None:
        fit_k(model, task.flops, images)

    task.fit(model, task.recipe.epochs, after_epoch=again)
    return finalized(model, task)


def become(model: nn.Module, kind: type[SaliencyModule]) -> None:
    """Let a model's saliency modules be of another class: their hooks stay."""
    for module in autogate.adaptive.bank(model).saliency_modules:
        module.__class__ = kind


def fit_k(model: nn.Module, flops: float, images: Sequence[Tensor]) -> None:
    """Compute the largest share of the channels, the same in all layers, that costs at most so much on these images."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        set_k(model, middle)
        low, high = (middle, high) if mean_cost(model, images) <= flops else (low, middle)
    set_k(model, low)


def set_k(model: nn.Module, share: float) -> None:
    for module in autogate.adaptive.bank(model).saliency_modules:
        module.k = max(1, round(share * module.expand.out_features))


def finalized(model: nn.Module, task: Task) -> nn.Module:
    """Without the channels that no image of the batches uses. Nothing is skipped: time isn't measured here."""
    images = [inputs for inputs, _ in task.batches]
    return autogate.adaptive.finalize(model, batches=images, break_even=0.0, warn=False)


def mean_cost(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """The share of the dense model's FLOPs that these images take on average."""
    return autogate.adaptive.use(model, batches).mean.share


ADAPTIVE: dict[str, Method] = {
    "autogate.adaptive": adaptive,
    "autogate.adaptive, fixed K": fixed_k,
    "autogate.adaptive, static": static,
}
