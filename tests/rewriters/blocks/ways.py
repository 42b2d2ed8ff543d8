"""Blocks whose forwards take other ways for other inputs: by a mask that is given or not, by a length."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from tests.rewriters.blocks.layers import Shape, conv, conv_norm_act, width


class ByMask(nn.Module):
    """Takes a mask or none, with a shortcut or without; its forward holds a size."""

    takes_mask = True

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        half, self.form = rng.randint(2, 6), rng.choice(["halves", "mean", "residual", "residual"])
        self.split = conv_norm_act(rng, shape, 2 * half)
        self.mix, self.masked = (conv(rng, (half, *shape[1:]), half) for _ in range(2))
        self.out = conv(rng, (half, *shape[1:]), shape[0])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        first, second = self.split(x).chunk(2, 1)
        if mask is not None:
            first = first.masked_fill(mask, 0.5)
        if self.form == "mean":
            first = first - first.mean(1, keepdim=True)
        first = self.mix(first) if mask is None or self.form == "halves" else self.mix(first) + self.masked(second)
        y = self.out(first.tanh() * second)
        return x + y if self.form == "residual" else y


class ByLength(nn.Module):
    """Takes another way where the last dimension is longer than the example's, or a loop over it."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        half, self.least = rng.randint(2, 6), shape[-1]
        self.form = rng.choice(["branch", "branch", "other layers", "loop"])
        self.split, self.mix = conv_norm_act(rng, shape, 2 * half), conv(rng, (half, *shape[1:]), half)
        self.wide, self.out = conv(rng, (half, *shape[1:]), half), conv(rng, (half, *shape[1:]), width(rng))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "loop":
            x = torch.stack([column * (index + 1) for index, column in enumerate(x.unbind(-1))], -1)
        first, second = self.split(x).chunk(2, 1)
        if x.shape[-1] > self.least:
            y = self.wide(first) if self.form == "other layers" else torch.sigmoid(first)
            return self.out(y + self.mix(second))
        return self.out(first * self.mix(second))
