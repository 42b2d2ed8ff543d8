"""Where the channels of what a layer reads and makes lie: behind the images, or last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where the channels of a feature map lie.

    Attributes:
        dims: how many dimensions of positions lie behind the channels: 2 for a convolution of images. None if channels
            come last, as those of a linear layer do: what lies between them and the images are positions.
    """

    dims: int | None

    @property
    def channel(self) -> int:
        """The dimension of the channels, counted from the end."""
        return -1 if self.dims is None else -1 - self.dims

    def positions(self, x: Tensor) -> float:
        """How many positions a feature map has, over all images."""
        return x.numel() / x.shape[self.channel]

    def means(self, x: Tensor) -> Tensor:
        """Equation 5: the mean of each channel over positions, shape (images, channels), in float32 at least."""
        precise = torch.promote_types(x.dtype, torch.float32)
        if self.dims is not None:
            return x.mean(tuple(range(-self.dims, 0)), dtype=None if x.dtype == precise else precise)
        return x.to(precise) if x.ndim < 3 else x.flatten(1, -2).mean(1, dtype=precise)

    def broadcast(self, channels: Tensor, x: Tensor) -> Tensor:
        """(images, channels), or (channels,) for all images, as a factor of the feature map `x`."""
        if self.dims is not None:
            return channels.view(*channels.shape, *[1] * self.dims)
        if channels.ndim < 2:
            return channels
        images, size = channels.shape  # no len(): an exported model takes any number of images
        return channels.view(images, *[1] * (x.ndim - 2), size)

    def nonzero(self, x: Tensor) -> Tensor:
        """Which channels aren't zero everywhere, bool, shape (channels,)."""
        return x.movedim(self.channel, -1).flatten(0, -2).ne(0).any(0)


def layout_of(layer: nn.Module) -> Layout:
    """The layout of a convolution or linear layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return Layout(None if isinstance(layer, nn.Linear) else weight.ndim - 2)
