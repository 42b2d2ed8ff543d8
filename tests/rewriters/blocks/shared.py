"""Modules and tensors used in several places, and ops without a rule."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

from tests.rewriters.blocks.layers import Shape, conv, conv_norm_act, dims_of, norm, width
from tests.rewriters.blocks.residual import Pair


class Shared(nn.Module):
    """One convolution called twice, or one parameter in two modules."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.inner = conv(rng, shape, shape[0])
        self.norms = nn.ModuleList(norm(rng, shape, shape[0]) for _ in range(2))
        self.twin = conv(rng, shape, shape[0], self.inner.kernel_size[0])
        self.twin.weight = self.inner.weight
        self.form = rng.choice(["twice", "twin", "both"])

    def forward(self, x):
        y = self.norms[0](self.inner(x))
        second = self.inner if self.form == "twice" else self.twin
        y = self.norms[1](second(F.relu(y)))
        return y + x if self.form == "both" else y


class Unknown(nn.Module):
    """Ops along the channels: statistics of them, and some that mix them and have to pin."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.conv = conv(rng, shape, width(rng))
        self.form = rng.choice(["renorm", "cumsum", "sort", "normalize", "softmax", "logcumsumexp", "max", "norm"])

    def forward(self, x):
        x = self.conv(x)
        if self.form == "renorm":
            return x.renorm(2, 1, 1.0)
        if self.form == "cumsum":
            return torch.cumsum(x, dim=1)
        if self.form == "sort":
            return torch.sort(x, dim=1)[0]
        if self.form == "normalize":
            return F.normalize(x, dim=1)
        if self.form == "softmax":
            return x * x.softmax(1)
        if self.form == "logcumsumexp":
            return torch.logcumsumexp(x, 1)
        if self.form == "max":
            return x - x.amax(1, keepdim=True)
        return x / (1 + torch.linalg.vector_norm(x, dim=1, keepdim=True))


class Constants(nn.Module):
    """Learned and fixed tensors that meet the channels: position embeddings, masks, coordinates."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.c = width(rng)
        self.conv = conv_norm_act(rng, shape, self.c)
        self.embedding = nn.Parameter(torch.randn(1, self.c, *[1] * dims_of(shape)))
        self.register_buffer("scale", torch.rand(self.c, *[1] * dims_of(shape)))
        self.form = rng.choice(["embedding", "buffer", "coordinates", "ones", "full", "expanded", "mask", "arange"])

    def forward(self, x):
        x = self.conv(x)
        ones = [1] * (x.ndim - 2)
        if self.form == "embedding":
            return x + self.embedding
        if self.form == "buffer":
            return x * self.scale + self.scale
        if self.form == "coordinates":
            line = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
            return torch.cat([x, line.expand(x.shape[0], 1, *x.shape[2:])], 1)
        if self.form == "ones":
            return x * torch.ones(1, self.c, *ones, dtype=x.dtype)
        if self.form == "full":
            return torch.cat([torch.full((x.shape[0], 2, *x.shape[2:]), 0.5, dtype=x.dtype), x], 1)
        if self.form == "expanded":
            token = self.embedding.expand(x.shape[0], -1, *x.shape[2:])
            return torch.cat([x, token], dim=1)
        if self.form == "mask":
            return torch.where(x > 0, x, torch.zeros_like(x)).masked_fill(x > 2, 2.0)
        return x + torch.arange(self.c, dtype=x.dtype).view(1, self.c, *ones)


class Half(nn.Module):
    """Swaps the halves of what it is given, with an option; without parameters, so that any module may share it."""

    def forward(self, x, scale=None, drop: bool = False):
        a, b = x.chunk(2, 1)
        if scale is not None:
            b = b * scale
        return b if drop else torch.cat([b, a], 1)


class SharedPlumbing(nn.Module):
    """One module without parameters called on tensors that have nothing to do with each other."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.convs = nn.ModuleList(conv(rng, shape, width(rng, multiple=2)) for _ in range(2))
        if rng.random() < 0.5:
            self.convs[1] = conv(rng, shape, self.convs[0].out_channels)
        self.swap = Half()
        self.form = rng.choice(["alike", "scaled", "dropped"])
        self.scale = nn.Parameter(torch.rand(1))

    def forward(self, x):
        a, b = (conv(x) for conv in self.convs)
        if self.form == "alike":
            return torch.cat([self.swap(a), self.swap(b)], 1)
        if self.form == "scaled":
            return torch.cat([self.swap(a), self.swap(b, scale=self.scale)], 1)
        return torch.cat([self.swap(a, drop=False), self.swap(b, drop=True)], 1)


class SharedPair(nn.Module):
    """A module with parameters called with different options."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.pair = Pair(rng, shape)
        self.conv = conv(rng, shape, shape[0])

    def forward(self, x):
        out = self.pair((x, self.conv(x)))
        out = self.pair([out["first"], out["rest"][0]], skip=x)
        return out["first"] + out["rest"][0]
