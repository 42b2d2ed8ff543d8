"""Norms and statistics, along channels and across them."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

from tests.rewriters.blocks.layers import Shape, activation, conv, conv_norm_act, dims_of, width


class InstanceScale(nn.Module):
    """Feature-wise modulation: one linear layer gives scale and shift for every channel."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.c = width(rng)
        self.conv = conv_norm_act(rng, shape, self.c)
        self.film = nn.Linear(self.c, 2 * self.c)
        self.stacked = rng.random() < 0.5

    def forward(self, x):
        x = self.conv(x)
        ones = [1] * (x.ndim - 2)
        film = self.film(x.flatten(2).mean(2))
        if self.stacked:
            scale, shift = film.view(-1, 2, self.c, *ones).unbind(1)
        else:
            scale, shift = (t.view(-1, self.c, *ones) for t in torch.split(film, self.c, dim=1))
        return torch.addcmul(shift, x, 1 + scale)


class Statistics(nn.Module):
    """Moments over positions, concatenated to the channels or beside them."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.conv = conv_norm_act(rng, shape, width(rng))
        self.form = rng.choice(["mean", "std", "max", "both"])

    def forward(self, x):
        x = self.conv(x)
        dims = tuple(range(2, x.ndim))
        mean = x.mean(dims, keepdim=True)
        if self.form == "mean":
            return torch.cat([x, mean.expand_as(x)], 1)
        if self.form == "std":
            return x - mean + x.var(dims, keepdim=True)
        if self.form == "max":
            return torch.cat([x - mean, x * x.amax(dims, keepdim=True)], 1)
        return torch.cat([x, torch.cat([mean, x.amin(dims, keepdim=True)], 1).expand(-1, -1, *x.shape[2:])], 1)


class ChannelNorm(nn.Module):
    """A norm across channels, in the ways it is written."""

    FORMS = (
        "module", "functional", "rms module", "rms functional", "group", "group functional", "hand-written", "variance",
        "response", "unit", "unit functional", "centred", "centred channels", "all", "evolved",
    )  # fmt: skip

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        c, self.dims = shape[0], dims_of(shape)
        self.channels, self.groups = c, rng.choice([g for g in (1, 2, 3, 4) if c % g == 0])
        self.form, affine = rng.choice(self.FORMS), rng.random() < 0.8
        self.weight, self.bias = nn.Parameter(torch.rand(c) + 0.5), nn.Parameter(torch.randn(c))
        self.norm = nn.Identity()
        if self.form == "module":
            self.norm = nn.LayerNorm(c, elementwise_affine=affine)
        elif self.form == "rms module":
            self.norm = nn.RMSNorm(c, elementwise_affine=affine)
        elif self.form == "group":
            self.norm = nn.GroupNorm(self.groups, c, affine=affine)

    def affine(self, x):
        along = (-1, *[1] * self.dims)
        return x * self.weight.view(along) + self.bias.view(along)

    def forward(self, x):
        if "module" in self.form:
            return self.norm(x.movedim(1, -1)).movedim(-1, 1)
        if self.form == "functional":
            return F.layer_norm(x.movedim(1, -1), (self.channels,), self.weight, self.bias, 1e-3).movedim(-1, 1)
        if self.form == "rms functional":
            return F.rms_norm(x.movedim(1, -1), (self.channels,), self.weight).movedim(-1, 1)
        if self.form == "group":
            return self.norm(x)
        if self.form == "group functional":
            return F.group_norm(x, self.groups, self.weight, self.bias)
        if self.form == "hand-written":
            u = x.mean(1, keepdim=True)
            s = (x - u).pow(2).mean(1, keepdim=True)
            return self.affine((x - u) / torch.sqrt(s + 1e-3))
        if self.form == "variance":
            variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
            return self.affine((x - mean) * torch.rsqrt(variance + 1e-3))
        if self.form == "response":
            g = torch.norm(x, p=2, dim=tuple(range(2, x.ndim)), keepdim=True)
            return x + self.affine(x * (g / (g.mean(1, keepdim=True) + 1e-3)))
        if self.form == "unit":
            return self.affine(x / (x.norm(dim=1, keepdim=True) + 1e-3))
        if self.form == "unit functional":
            return self.affine(F.normalize(x, dim=1, eps=1e-3))
        if self.form == "centred":
            return x - x.mean(dim=1, keepdim=True)
        if self.form == "centred channels":
            return x - x.flatten(2).mean(2).mean(1)[(slice(None), *[None] * (x.ndim - 1))]
        if self.form == "all":
            return self.affine(F.layer_norm(x, x.shape[1:], eps=1e-3))
        grouped = x.reshape(x.shape[0], self.groups, self.channels // self.groups, *x.shape[2:])
        deviation = grouped.pow(2).mean(tuple(range(2, grouped.ndim)), keepdim=True).add(1e-3).sqrt()
        return self.affine(x / deviation.expand(grouped.shape).reshape(x.shape))


class PreNorm(nn.Module):
    """A residual stream with a norm across channels before each branch, perhaps one inside it and one behind."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        out = rng.choice([shape[0], width(rng)])
        self.stem = conv(rng, shape, out) if out != shape[0] else nn.Identity()
        stream = (out, *shape[1:])
        self.branches = nn.ModuleList()
        for _ in range(rng.randint(1, 2)):
            hidden = width(rng)
            inner = ChannelNorm(rng, (hidden, *shape[1:])) if rng.random() < 0.4 else nn.Identity()
            self.branches.append(nn.Sequential(
                ChannelNorm(rng, stream), conv(rng, stream, hidden), activation(rng, hidden), inner,
                conv(rng, (hidden, *shape[1:]), out),
            ))  # fmt: skip
        self.last = ChannelNorm(rng, stream) if rng.random() < 0.5 else nn.Identity()

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.last(x)
