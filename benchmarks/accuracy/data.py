"""Data sets as two tensors, on the device that trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

HOLD_OUT = 5
"""One in this many training samples is held out for choosing settings."""


class Data(NamedTuple):
    """Inputs as they are stored (images: (N, 3, H, W) uint8), and labels, both with N along the first dimension."""

    inputs: Tensor
    labels: Tensor

    def to(self, device: str) -> Data:
        return Data(*(tensor.to(device) for tensor in self))

    def some(self, count: int | None) -> Data:
        """So many samples, drawn from all, always the same ones; all if None."""
        if count is None:
            return self
        chosen = _shuffled(len(self.labels))[:count]
        return Data(self.inputs[chosen], self.labels[chosen])


def packed(folder: Path, split: str) -> Data | None:
    """The images and labels of `train.npz` or `test.npz`, if the folder has them.

    They have arrays `images`, (N, H, W, 3) uint8, and `labels`, one a sample or one a pixel.
    """
    path = folder / f"{split}.npz"
    if not path.exists():
        return None
    with np.load(path) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    return Data(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long())


def load(folder: Path, split: str) -> Data:
    """Load the split named "train" or "test" from torchvision's CIFAR-10, or from `train.npz` and `test.npz`."""
    found = packed(folder, split)
    if found is not None:
        return found
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(str(folder), train=split == "train")
    except RuntimeError as error:
        sys.exit(f"{folder} has neither {split}.npz nor torchvision's CIFAR-10: {error}")
    return Data(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))


def held_out(train: Data) -> tuple[Data, Data]:
    """Split off a fifth of the training set: always the same samples, drawn from all classes."""
    order = _shuffled(len(train.labels))
    cut = len(order) // HOLD_OUT
    return tuple(Data(train.inputs[part], train.labels[part]) for part in (order[cut:], order[:cut]))


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def layout(device: torch.device) -> torch.memory_format:
    """Use channels_last, which is faster, but not on processors without AVX-512.

    There, PyTorch 2.14's backward of a strided 1x1 convolution with fewer than eight channels writes out of bounds.
    """
    plain = device.type == "cpu" and not torch.cpu._is_avx512_supported()
    return torch.contiguous_format if plain else torch.channels_last


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))
    return ((images.float() - mean) / std).contiguous(memory_format=layout(images.device))


def augment(images: Tensor) -> Tensor:
    """Flip and shift the whole batch at once, by up to 4 pixels."""
    count, side, device = len(images), images.shape[-1], images.device
    flip = torch.rand(count, device=device) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4))
    rows = torch.randint(9, (count, 1), device=device) + torch.arange(side, device=device)
    columns = torch.randint(9, (count, 1), device=device) + torch.arange(side, device=device)
    at = torch.arange(count, device=device).view(-1, 1, 1, 1), torch.arange(3, device=device).view(1, -1, 1, 1)
    return padded[at[0], at[1], rows.view(count, 1, side, 1), columns.view(count, 1, 1, side)]
