"""What the validation images of a run use of a model that chooses its channels for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from autogate.files import atomic_write
from autogate.saliency import LayerUse


@dataclass(frozen=True)
class ImageUse:
    """What the validation images use of a model that chooses its channels for each image.

    Attributes:
        layers: how many channels of each layer that chooses are never, sometimes and always used.
        shares: the share of the FLOPs that each image takes.
        channels: how many channels are computed for each image, over these layers.
    """

    layers: tuple[LayerUse, ...]
    shares: tuple[float, ...]
    channels: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The share that an image takes on average."""
        return sum(self.shares) / len(self.shares)


def write_row(images: Sequence[Tensor], file: Path) -> None:
    """Write images of one size, with values in [0, 1], side by side as a PNG file."""
    row = torch.cat(list(images), 2)
    with atomic_write(file) as temporary:
        to_pil_image(row[:3] if len(row) >= 3 else row[:1]).save(temporary, format="png")
