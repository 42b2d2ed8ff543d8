"""Elements picked by their order, and written to by masks, numbers and slices."""

from __future__ import annotations

import random
from math import prod

import torch
import torch.nn.functional as F
from torch import nn

from tests.rewriters.blocks.layers import Shape, conv, width


class Written(nn.Module):
    """A convolution whose result is written to."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.out = width(rng, multiple=2)
        self.conv, self.score = conv(rng, shape, self.out), conv(rng, shape, 1)
        self.token = nn.Parameter(torch.randn(self.out, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("mask", torch.arange(prod(shape[1:])) % 3 == 0)
        self.form = rng.choice(["number", "token", "chosen", "largest", "added", "halves", "rows"])
        self.any_size = self.form != "token"  # its mask has the size of the example

    def forward(self, x):
        y = self.conv(x).clone()
        flat = y.flatten(2)
        if self.form == "number":
            y[y < 0] = 0.1
            return y
        if self.form == "token":
            tokens = flat.transpose(1, 2).clone()
            tokens[:, self.mask] = self.token
            return tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        if self.form == "chosen":
            best = self.score(x).flatten(2).topk(max(1, flat.shape[2] // 2)).indices.expand(-1, self.out, -1)
            return flat.scatter(2, best, F.gelu(flat.gather(2, best))).view(y.shape)
        if self.form == "largest":
            return y + torch.zeros_like(flat).scatter_(2, flat.argmax(2, keepdim=True), 1.0).view_as(y)
        if self.form == "added":
            return flat.index_add(2, flat.new_zeros(1, dtype=torch.long), flat[..., -1:]).reshape(y.shape)
        if self.form == "halves":
            y[:, : self.out // 2] = y[:, self.out // 2 :].tanh()
            return y
        y[:, self.out // 2 :, [0]] = y[:, self.out // 2 :, -1:].sigmoid()
        return y
