"""A real data set that comes with a package: scikit-learn's handwritten digits, 8x8 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

SIZE = 32
"""Side of the upscaled images, in pixels: large enough for a small timm network."""


@dataclass(frozen=True)
class Split:
    """Images, float32 in [-1, 1] of shape (N, 1, SIZE, SIZE), and labels, int64 of shape (N,)."""

    images: Tensor
    labels: Tensor


def load(seed: int = 0, test_share: float = 0.25) -> tuple[Split, Split]:
    """Load the 1,797 digits, shuffled by `seed`, as a train and a test split."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    images = F.interpolate(images, SIZE, mode="bilinear")
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = int(len(labels) * (1 - test_share))
    return tuple(Split(images[part], labels[part]) for part in (order[:cut], order[cut:]))  # type: ignore[return-value]
