"""Two small networks: a plain chain of convolutions, and a residual stage."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def chain(norms: bool = True) -> nn.Sequential:
    """Three convolutions, with batch norms of random scales or with nothing but ReLUs between, and a linear layer."""
    layers: list[nn.Module] = []
    for into, out in ((3, 8), (8, 12), (12, 8)):
        layers += [nn.Conv2d(into, out, 3, padding=1, bias=False), *([nn.BatchNorm2d(out)] if norms else []), nn.ReLU()]
    return randomised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5, bias=False)))


class Stage(nn.Module):
    """A stem and two residual blocks, which all share one width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))
            for _ in range(2)
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


def stage() -> Stage:
    return randomised(Stage())


def randomised(net: M) -> M:
    """The network in eval mode, with random norms."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()
