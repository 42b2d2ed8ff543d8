"""Small networks and data for the tests of training loops."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Residual(nn.Module):
    """A stem, a residual block and a classifier, with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 1))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


class Halves(Residual):
    """Its own forward holds a size: finalize has to write it anew."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first, second = self.block(x).split(8, 1)
        return self.head(torch.cat([first, second.relu()], 1).mean((2, 3)))


EXAMPLE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def batches(count: int, size: int = 4) -> DataLoader:
    """`count` batches of images (size, 3, 8, 8) and labels that their mean decides."""
    images = torch.randn(count * size, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0).long()), size)
