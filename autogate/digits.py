"""A real data set that comes with a package: scikit-learn's handwritten digits, 8x8 pixels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriters import AutogateError

SIZE = 32
"""Side of the upscaled images, in pixels: large enough for a small timm network."""


@dataclass(frozen=True)
class Split:
    """Images, float32 in [-1, 1] of shape (N, 1, SIZE, SIZE), and labels, int64 of shape (N,)."""

    images: Tensor
    labels: Tensor


def load(seed: int = 0, test_share: float = 0.25) -> tuple[Split, Split]:
    """Load the 1,797 digits, shuffled by `seed`, as a train and a test split.

    Raises:
        AutogateError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise AutogateError("the handwritten digits come with scikit-learn.", remedy="pip install 'autogate[demo]'")
    from sklearn.datasets import load_digits  # it takes a second to import

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    images = F.interpolate(images, SIZE, mode="bilinear")
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = int(len(labels) * (1 - test_share))
    return tuple(Split(images[part], labels[part]) for part in (order[:cut], order[cut:]))  # type: ignore[return-value]
