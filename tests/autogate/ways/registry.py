"""The ways to choose which channels die, and the networks that all of them have to slim.

A new method or criterion is a line in `WAYS`; `test_ways.py` then runs it through everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import autogate
from autogate.criteria import CRITERIA
from autogate.methods import Method
from tests.autogate.gated_nets import ConvNet

STEPS = 40


@dataclass(frozen=True)
class Way:
    """A way to close the gates of a prepared model until its budget is met.

    Attributes:
        close: does so; the model is trained by the first argument, `train(model, steps)`, if the way needs it.
        method: the method that the model is prepared with; the default if None.
        nets: the networks that it can bring to their budget; all of them if None.
    """

    close: Callable[[Callable[[nn.Module, int], None], nn.Module], None]
    method: Method | None = None
    nets: tuple[str, ...] | None = None

    @property
    def trains(self) -> bool:
        return self.method is not None


BATCH_NORMS = ("plain", "residual", "depthwise")
"""Networks with batch norms behind enough of their layers."""


def learned(method: Method) -> Way:
    """Gates learn by this method."""
    return Way(lambda train, model: train(model, STEPS), method)


def scored(by: str, compensate: bool = False) -> Way:
    """Gates are closed at once by this criterion."""

    def close(train: Callable[[nn.Module, int], None], model: nn.Module) -> None:
        device = next(model.parameters()).device
        data = [(batch.to(device), labels.to(device)) for batch, labels in batches(3)]
        autogate.close(model, by, batches=data, loss=nn.functional.cross_entropy, compensate=compensate)

    return Way(close, nets=BATCH_NORMS if by == "bn_scale" else None)


WAYS: dict[str, Way] = {
    "GDP": learned(autogate.GDP()),
    "ClippedLasso": learned(autogate.ClippedLasso()),
    "group Lasso": learned(autogate.ClippedLasso(a=math.inf)),
    "l1": scored("l1"),
    "taylor": scored("taylor"),
    **{by: scored(by) for by in CRITERIA},
    **{f"{by}, compensated": scored(by, compensate=True) for by in ("l1", "taylor")},
}


class Concatenation(nn.Module):
    """Two branches side by side, one of them deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 1)
        self.right = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 20, 1))
        self.mix, self.head = nn.Conv2d(32, 24, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.mix(torch.cat([self.left(x), self.right(x)], 1).relu()).relu().mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.expand, self.depth, self.project = (
            nn.Conv2d(16, 48, 1),
            nn.Conv2d(48, 48, 3, 1, 1, groups=48),
            nn.Conv2d(48, 16, 1),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.project(self.depth(self.expand(x).relu()).relu())
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A transformer's block with 8 heads, on the pixels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Conv2d(3, 32, 2, 2), nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, 8, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Shared(nn.Module):
    """One block that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = (
            nn.Conv2d(3, 24, 3),
            nn.Sequential(nn.Conv2d(24, 32, 1), nn.ReLU(), nn.Conv2d(32, 24, 1)),
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for _ in range(2):
            x = x + self.block(x)
        return self.head(x.relu().mean((2, 3)))


class Sizes(nn.Module):
    """A forward that holds numbers of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.body(self.stem(x).relu()).split(16, 1)
        return self.head((first * second.sigmoid()).mean((2, 3)).view(-1, 16))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": ConvNet,
    "residual": lambda: ConvNet(residual=True),
    "concatenation": Concatenation,
    "depthwise": Depthwise,
    "attention": Attention,
    "shared layers": Shared,
    "sizes in forwards": Sizes,
}


def batches(count: int, first: int = 0, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Images (size, 3, 6, 6) and labels that a linear map decides."""
    teacher = torch.randn(3 * 36, 5, generator=torch.Generator().manual_seed(99))
    found = []
    for seed in range(first, first + count):
        images = torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        found.append((images, (images.flatten(1) @ teacher).argmax(1)))
    return found
