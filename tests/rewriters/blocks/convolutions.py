"""Convolutions other than the usual ones, and layers called as functions."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

from tests.rewriters.blocks.layers import Shape, activation, conv, conv_norm_act, dims_of, width


class Depthwise(nn.Module):
    """Depthwise convolution, with a multiplier at times, and a pointwise one behind it."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.expand = conv_norm_act(rng, shape, width(rng), 1) if rng.random() < 0.5 else nn.Identity()
        middle = self.expand[0].out_channels if isinstance(self.expand, nn.Sequential) else shape[0]
        wide = middle * rng.choice([1, 1, 2, 3]) if middle <= 12 else middle
        self.depthwise = conv_norm_act(rng, (middle, *shape[1:]), wide, 3, groups=middle)
        self.project = conv(rng, (wide, *shape[1:]), shape[0], 1) if rng.random() < 0.7 else None

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        return y if self.project is None else x + self.project(y)


class Grouped(nn.Module):
    """Grouped convolutions with more or fewer groups than channels in one, of equal or unequal widths."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        groups, into, out = rng.choice([2, 3, 4]), rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 3, 5])
        self.reduce = conv_norm_act(rng, shape, groups * into, 1)
        self.grouped = conv_norm_act(rng, (groups * into, *shape[1:]), groups * out, 3, groups=groups)
        self.shuffle = rng.choice(["none", "module", "view", "view"])
        self.groups, self.out = groups, out
        self.project = conv(rng, (groups * out, *shape[1:]), width(rng), 1, groups=1)

    def forward(self, x):
        x = self.grouped(self.reduce(x))
        if self.shuffle == "module":
            x = F.channel_shuffle(x, self.groups)
        elif self.shuffle == "view":
            b = x.shape[0]
            x = x.view(b, self.groups, self.out, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.project(x)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half the channels pass, half are convolved, then all are shuffled."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        half = rng.randint(2, 5)
        self.first = conv(rng, shape, 2 * half)
        self.branch = nn.Sequential(
            conv_norm_act(rng, (half, *shape[1:]), half, 1),
            conv(rng, (half, *shape[1:]), half, 3, groups=half),
            conv_norm_act(rng, (half, *shape[1:]), half, 1),
        )
        self.channels = 2 * half
        self.form = rng.choice(["function", "module", "hand"])
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x):
        x1, x2 = self.first(x).chunk(2, dim=1)
        out = torch.cat((x1, self.branch(x2)), dim=1)
        if self.form != "hand":
            return self.shuffle(out) if self.form == "module" else F.channel_shuffle(out, 2)
        batch, channels = out.size()[:2]
        spatial = out.size()[2:]
        out = out.view(batch, 2, channels // 2, *spatial)
        out = torch.transpose(out, 1, 2).contiguous()
        return out.view(batch, -1, *spatial)


class PixelShuffle(nn.Module):
    """Depth to space and back, by torch's own ops or by hand."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.c = rng.randint(1, 3)
        self.conv = conv(rng, shape, 4 * self.c)
        self.form = rng.choice(["op", "module", "hand"])
        self.shuffle = nn.PixelShuffle(2)
        self.inner = conv(rng, (self.c, 2 * shape[1], 2 * shape[2]), rng.randint(1, 3))
        self.back = rng.choice(["op", "hand", "slices"])

    def forward(self, x):
        x = self.conv(x)
        b, _, h, w = x.shape
        if self.form == "op":
            x = F.pixel_shuffle(x, 2)
        elif self.form == "module":
            x = self.shuffle(x)
        else:
            x = x.view(b, self.c, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, self.c, 2 * h, 2 * w)
        x = self.inner(x)
        if self.back == "op":
            return F.pixel_unshuffle(x, 2)
        if self.back == "hand":
            c = x.shape[1]
            return x.reshape(b, c, h, 2, w, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, c * 4, h, w)
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


class FunctionalConv(nn.Module):
    """Convolutions by function, the parameters being the module's own."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.groups, self.dims = rng.choice([1, 2, 3]), dims_of(shape)
        per_group, out = rng.randint(1, 4), rng.randint(1, 4)
        self.inner = conv(rng, shape, self.groups * per_group)
        self.weight = nn.Parameter(torch.randn(self.groups * out, per_group, *[3] * self.dims) / 3)
        self.bias = nn.Parameter(torch.randn(self.groups * out)) if rng.random() < 0.5 else None
        self.keyword = rng.random() < 0.5

    def forward(self, x):
        op = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        x = self.inner(x)
        if self.keyword:
            return op(x, self.weight, bias=self.bias, padding=1, groups=self.groups)
        return op(x, self.weight, self.bias, 1, 1, 1, self.groups)


class FunctionalLayers(nn.Module):
    """Norm and linear layer by function, with parameters and buffers of the module itself."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        c, out = shape[0], width(rng)
        self.weight, self.bias = nn.Parameter(torch.rand(c) + 0.5), nn.Parameter(torch.randn(c))
        self.register_buffer("mean", torch.randn(c))
        self.register_buffer("var", torch.rand(c) + 0.5)
        self.matrix = nn.Parameter(torch.randn(*((out, c) if (flip := rng.random() < 0.5) else (c, out))))
        self.flip = flip
        self.form = rng.choice(["linear", "matmul", "einsum"])

    def forward(self, x):
        x = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training)
        matrix = self.matrix if self.flip else self.matrix.t()
        if self.form == "einsum":
            return torch.einsum("bc...,oc->bo...", x, matrix)
        x = x.movedim(1, -1)
        x = F.linear(x, matrix) if self.form == "linear" else x @ matrix.transpose(0, 1)
        return x.movedim(-1, 1)


class ChannelsLast(nn.Module):
    """ConvNeXt: depthwise, then a norm and linear layers over channels put last, with a layer scale."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        c, hidden = shape[0], width(rng)
        self.conv = conv(rng, shape, c, 3, groups=c)
        self.norm = nn.LayerNorm(c) if rng.random() < 0.3 else nn.Identity()
        self.fc1, self.act, self.fc2 = nn.Linear(c, hidden), activation(rng, 1), nn.Linear(hidden, c)
        self.gamma = nn.Parameter(torch.rand(c))

    def forward(self, x, scale=None):
        dims = range(2, x.ndim)
        y = self.conv(x).permute(0, *dims, 1)
        y = self.gamma * self.fc2(self.act(self.fc1(self.norm(y))))
        y = y.permute(0, -1, *range(1, x.ndim - 1))
        return x + (y if scale is None else y * scale)


class StandardisedConv(nn.Module):
    """A kernel computed from its parameter in the forward pass."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.inner = conv_norm_act(rng, shape, width(rng))
        self.conv = conv(rng, (self.inner[0].out_channels, *shape[1:]), width(rng), 3, padding_mode="zeros")

    def forward(self, x):
        weight = self.conv.weight
        weight = (weight - weight.mean(dim=tuple(range(1, weight.ndim)), keepdim=True)) / 2
        return self.conv._conv_forward(self.inner(x), weight, self.conv.bias)


class DynamicConv(nn.Module):
    """CondConv: each sample's kernel is a mixture of experts' kernels."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.inner = conv_norm_act(rng, shape, width(rng))
        self.c, self.out = self.inner[0].out_channels, width(rng)
        self.route = nn.Linear(self.c, 2)
        self.experts = nn.Parameter(torch.randn(2, self.out * self.c) / 3)

    def forward(self, x):
        x = self.inner(x)
        b, c, h, w = x.shape
        mixture = torch.sigmoid(self.route(x.mean((2, 3))))
        weight = (mixture @ self.experts).view(b * self.out, self.c, 1, 1)
        return F.conv2d(x.reshape(1, b * c, h, w), weight, groups=b).view(b, self.out, h, w)


class Bilinear(nn.Module):
    """Products of activations with each other: the sum over positions keeps both channel dimensions."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.theta, self.phi = conv(rng, shape, rng.randint(2, 4), 1), conv(rng, shape, rng.randint(2, 4), 1)
        self.value = conv(rng, shape, width(rng))
        self.form = rng.choice(["gram", "global", "affinity"])
        self.out = conv(rng, (self.theta.out_channels * self.phi.out_channels, *shape[1:]), width(rng), 1)

    def forward(self, x):
        a, b = self.theta(x).flatten(2), self.phi(x).flatten(2)
        if self.form == "gram":
            gram = torch.bmm(a, b.transpose(1, 2)).flatten(1)
            ones = [1] * (x.ndim - 2)
            return self.out(gram.view(*gram.shape, *ones).expand(-1, -1, *x.shape[2:]))
        v = self.value(x)
        if self.form == "global":
            context = torch.einsum("bcn,bdn->bcd", b.softmax(-1), v.flatten(2)).mean(1)
            return v + context.view(*context.shape, *[1] * (x.ndim - 2))
        affinity = torch.softmax(a.transpose(1, 2) @ a, dim=-1)
        return (v.flatten(2) @ affinity).view(v.shape)
