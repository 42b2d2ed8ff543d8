"""Concatenations, splits and slices of channels."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.rewriters.blocks.layers import Shape, conv, conv_norm_act, dims_of, norm, width


class DenseLayer(nn.Module):
    """Takes the list of all features so far."""

    def __init__(self, rng: random.Random, shape: Shape, growth: int):
        super().__init__()
        self.norm = norm(rng, shape, shape[0])
        self.conv = conv(rng, shape, growth)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))


class Dense(nn.Module):
    """A dense block: every layer sees the concatenation of all before it."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        growth = rng.randint(2, 4)
        self.layers = nn.ModuleDict(
            {f"layer{i}": DenseLayer(rng, (shape[0] + i * growth, *shape[1:]), growth) for i in range(2)}
        )

    def forward(self, x):
        features = [x]
        for layer in self.layers.values():
            features.append(layer(features))
        return torch.cat(features, dim=1)


class CrossStage(nn.Module):
    """CSP: halves of a convolution's channels go two ways and are concatenated."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        half = rng.randint(2, 6)
        self.conv = conv(rng, shape, 2 * half)
        self.branch = conv_norm_act(rng, (half, *shape[1:]), width(rng))
        self.half = half
        self.form = rng.choice(["chunk", "split", "sizes", "slices", "method", "tensor_split", "narrow", "sized chunk"])

    def halves(self, x):
        if self.form == "chunk":
            return x.chunk(2, dim=1)
        if self.form == "split":
            return torch.split(x, self.half, 1)
        if self.form == "sizes":
            return x.split([self.half, self.half], dim=1)
        if self.form == "slices":
            return x[:, : self.half], x[:, self.half :]
        if self.form == "method":
            return x.split(self.half, 1)
        if self.form == "tensor_split":
            return torch.tensor_split(x, 2, dim=1)
        if self.form == "narrow":
            return x.narrow(1, 0, self.half), torch.narrow(x, 1, self.half, self.half)
        return torch.chunk(input=x, chunks=2, dim=1)

    def forward(self, x):
        a, b = self.halves(self.conv(x))
        return torch.cat((a, self.branch(b)), 1)


class UnevenSplit(nn.Module):
    """Three uneven parts by literal sizes; one passes, one is convolved, one is gated, order changed."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.sizes = [rng.randint(1, 4) for _ in range(3)]
        self.conv = conv_norm_act(rng, shape, sum(self.sizes))
        self.inner = conv(rng, (self.sizes[1], *shape[1:]), self.sizes[1])
        self.slices = rng.random() < 0.5

    def forward(self, x):
        x = self.conv(x)
        if self.slices:
            first, second = self.sizes[0], self.sizes[0] + self.sizes[1]
            a, b, c = x[:, :first], x[:, first:second], x[:, -self.sizes[2] :, ...]
        else:
            a, b, c = torch.split(x, self.sizes, dim=1)
        return torch.cat([c.sigmoid(), self.inner(b) + b, a], 1)


class Res2(nn.Module):
    """Res2Net: parts of the width, each convolved together with the one before it."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.width, self.scale = rng.randint(2, 4), rng.randint(2, 4)
        self.conv1 = conv_norm_act(rng, shape, self.width * self.scale)
        self.convs = nn.ModuleList(
            conv_norm_act(rng, (self.width, *shape[1:]), self.width) for _ in range(self.scale - 1)
        )
        self.conv3 = conv(rng, (self.width * self.scale, *shape[1:]), shape[0])
        self.keeps_first = rng.random() < 0.5

    def forward(self, x):
        spx = torch.split(self.conv1(x), self.width, 1)
        spo = []
        sp = spx[0]
        for i, part in enumerate(self.convs):
            sp = spx[i] if i == 0 else sp + spx[i]
            sp = part(sp)
            spo.append(sp)
        spo.append(spx[self.scale - 1] if self.keeps_first else spx[0])
        return x + self.conv3(torch.cat(spo, 1))


class Ghost(nn.Module):
    """GhostNet: cheap depthwise copies beside the real channels, then a slice to the wanted width."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.out = width(rng)
        primary = (self.out + 1) // 2
        self.primary = conv_norm_act(rng, shape, primary)
        self.cheap = conv_norm_act(rng, (primary, *shape[1:]), primary, 3, groups=primary)

    def forward(self, x):
        x1 = self.primary(x)
        x2 = self.cheap(x1)
        return torch.cat([x1, x2], dim=1)[:, : self.out]


class Partial(nn.Module):
    """FasterNet: a convolution over the first channels only."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.first = rng.randint(1, max(1, shape[0] - 1))
        self.rest = shape[0] - self.first
        self.conv = conv(rng, (self.first, *shape[1:]), self.first)
        self.mlp = conv_norm_act(rng, shape, shape[0], 1)
        self.in_place = rng.random() < 0.5

    def forward(self, x):
        if self.in_place:
            y = x.clone()
            y[:, : self.first] = self.conv(y[:, : self.first])
        else:
            a, b = torch.split(x, [self.first, self.rest], dim=1)
            y = torch.cat((self.conv(a), b), 1)
        return x + self.mlp(y)


class SliceAdd(nn.Module):
    """ReXNet: the shortcut is added in place to the first channels, the others are new."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.n = shape[0]
        self.conv = conv_norm_act(rng, shape, shape[0] + rng.randint(1, 4))
        self.form = rng.choice(["in place", "method", "cat", "view"])

    def forward(self, x):
        y = self.conv(x)
        if self.form == "in place":
            y[:, : self.n] += x
        elif self.form == "method":
            y[:, 0 : self.n].add_(x)
        elif self.form == "view":
            head = y.narrow(1, 0, self.n)
            head.mul_(x)
        else:
            y = torch.cat([y[:, : self.n] + x, y[:, self.n :]], dim=1)
        return y


class Rearranged(nn.Module):
    """Channels moved about: flipped, rolled, permuted by a buffer, repeated."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        c = width(rng, multiple=2)
        self.conv, self.c = conv(rng, shape, c), c
        order = list(range(c))
        rng.shuffle(order)
        self.register_buffer("order", torch.tensor(order))
        self.indices = order
        self.form = rng.choice([
            "flip", "roll", "index_select", "index", "list", "repeat", "repeat_interleave", "expand", "gather",
            "unfold", "swap", "tile",
        ])  # fmt: skip

    def forward(self, x):
        x = self.conv(x)
        if self.form == "flip":
            return x.flip(1)
        if self.form == "roll":
            return torch.roll(x, 1, 1)
        if self.form == "index_select":
            return x.index_select(1, self.order)
        if self.form == "index":
            return x[:, self.order]
        if self.form == "list":
            return x[:, self.indices]
        if self.form == "repeat":
            return x.repeat(1, 2, *[1] * (x.ndim - 2))
        if self.form == "repeat_interleave":
            return x.repeat_interleave(2, dim=1)
        if self.form == "expand":
            return x.unsqueeze(1).expand(-1, 2, *[-1] * (x.ndim - 1)).flatten(1, 2)
        if self.form == "gather":
            return x.gather(1, self.order.view(1, -1, *[1] * (x.ndim - 2)).expand(x.shape))
        if self.form == "unfold":
            return x.unfold(1, 2, 2).sum(-1)
        if self.form == "tile":
            return torch.tile(x, (2, *[1] * (x.ndim - 2)))
        a, b = x[:, : self.c // 2], x[:, self.c // 2 :]
        return torch.cat([b, a], 1)


class PadModule(nn.Module):
    """Padding of channels in a module that does nothing else, between convolutions in others."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.widths = (0, 0) * dims_of(shape) + (rng.randint(0, 2), rng.randint(0, 3))
        self.cut = rng.random() < 0.3 and shape[0] > 4

    def forward(self, x):
        x = F.pad(x, self.widths)
        return x[:, 1:-1] if self.cut else x


class Halving(nn.Module):
    """Padding modules in a chain of convolutions."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.first = conv_norm_act(rng, shape, width(rng))
        middle = (self.first[0].out_channels, *shape[1:])
        self.pad = PadModule(rng, middle)
        with torch.no_grad():
            middle = tuple(self.pad(torch.zeros(1, *middle)).shape[1:])
        self.last = conv(rng, middle, width(rng)) if rng.random() < 0.7 else nn.Identity()

    def forward(self, x):
        return self.last(self.pad(self.first(x)))
