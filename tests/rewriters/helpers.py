"""Helpers that tests of single parts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewriters.analysis import Analysis, analyse
from rewriters.labelling.channel_map import ALWAYS, ChannelMap, Side


class Net(nn.Module):
    """A forward given as a function of the module, over named children and parameters."""

    def __init__(self, forward: Callable[..., Any], **members: Any):
        super().__init__()
        self.function = forward
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def image(channels: int = 3, size: int = 4, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def conv(into: int, out: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def analysed(forward: Callable[..., Any], *args: Tensor, **members: Any) -> Analysis:
    return analyse(Net(forward, **members).eval(), args or (image(),))


def mapped(forward: Callable[..., Any], *args: Tensor, **members: Any) -> ChannelMap:
    """The channel map of a small network."""
    return analysed(forward, *args, **members).channel_map


def classes(channel_map: ChannelMap, tensor: str, dim: int) -> list[int]:
    """Classes along one dimension of a parameter; all pinned where the map doesn't list it."""
    side = Side(tensor, dim)
    if side in channel_map.classes:
        return channel_map.classes[side].tolist()
    return [ALWAYS] * channel_map.sizes.get(side, 1)


def is_pinned(channel_map: ChannelMap, tensor: str, dim: int) -> bool:
    return set(classes(channel_map, tensor, dim)) == {ALWAYS}


def reasons(channel_map: ChannelMap, tensor: str, dim: int) -> list[str]:
    """Why the channels along a dimension are pinned: "op: reason" for each pin."""
    return [f"{pin.op}: {pin.reason}" for pin in channel_map.pins if Side(tensor, dim) in pin.sides]
