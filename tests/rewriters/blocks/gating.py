"""Products of activations: excitation, selection, attention, gated units."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

from tests.rewriters.blocks.layers import AVG_POOL, GLOBAL_POOL, Shape, conv, conv_norm_act, dims_of, width


class SqueezeExcite(nn.Module):
    """Channel attention, squeezed by convolutions or by linear layers."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        hidden, channels = rng.randint(2, 6), shape[0]
        self.dims, self.channels = dims_of(shape), channels
        self.form = rng.choice(["conv", "view", "flatten", "unsqueeze", "unflatten", "expand", "reshape literal"])
        point = (channels, *[1] * self.dims)
        if self.form == "conv":
            self.fc1 = conv(rng, point, hidden, 1)
            self.fc2 = conv(rng, (hidden, *point[1:]), channels, 1)
        else:
            self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels, bias=rng.random() < 0.5)
        self.pool = GLOBAL_POOL[self.dims](1)
        self.gate = rng.choice([nn.Sigmoid(), nn.Hardsigmoid(), nn.ReLU()])

    def forward(self, x):
        b, c = x.shape[:2]
        axes = tuple(range(2, 2 + self.dims))
        if self.form == "conv":
            s = self.fc2(F.relu(self.fc1(x.mean(axes, keepdim=True))))
        elif self.form == "view":
            s = self.fc2(F.relu(self.fc1(self.pool(x).view(b, c)))).view(b, c, *[1] * self.dims)
        elif self.form == "flatten":
            s = self.fc2(self.fc1(torch.flatten(self.pool(x), 1)).relu_()).reshape(-1, c, *[1] * self.dims)
        elif self.form == "unsqueeze":
            s = self.fc2(F.relu(self.fc1(x.mean(axes))))
            for _ in range(self.dims):
                s = s.unsqueeze(-1)
        elif self.form == "unflatten":
            s = self.fc2(F.relu(self.fc1(x.mean(axes)))).unflatten(1, (self.channels, *[1] * self.dims))
        elif self.form == "expand":
            s = self.fc2(F.relu(self.fc1(x.flatten(2).mean(2)))).view(-1, self.channels, *[1] * self.dims)
            s = s.expand(-1, self.channels, *x.shape[2:])
        else:
            s = self.fc2(F.relu(self.fc1(self.pool(x).reshape(-1, self.channels))))
            s = s.view(s.size(0), self.channels, *[1] * self.dims).expand_as(x)
        return x * self.gate(s)


class SelectiveKernel(nn.Module):
    """SKNet: a softmax over branches weighs them, stacked or split."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.out, self.dims, hidden = width(rng), dims_of(shape), rng.randint(2, 5)
        self.paths = nn.ModuleList(conv_norm_act(rng, shape, self.out) for _ in range(2))
        self.form = rng.choice(["stack", "chunk", "separate"])
        self.reduce = nn.Linear(self.out, hidden)
        count = 2 if self.form == "separate" else 1
        self.select = nn.ModuleList(nn.Linear(hidden, self.out * 2 // count) for _ in range(count))

    def forward(self, x):
        ones = [1] * self.dims
        branches = [path(x) for path in self.paths]
        if self.form == "stack":
            stacked = torch.stack(branches, dim=1)
            z = F.relu(self.reduce(stacked.sum(1).flatten(2).mean(-1)))
            attention = self.select[0](z).view(-1, 2, self.out, *ones).softmax(dim=1)
            return (stacked * attention).sum(dim=1)
        z = F.relu(self.reduce(sum(branches).flatten(2).mean(2)))
        if self.form == "chunk":
            a, b = torch.softmax(self.select[0](z).reshape(z.shape[0], 2, -1), dim=1).chunk(2, dim=1)
            return sum(v * w.reshape(-1, self.out, *ones) for v, w in zip(branches, (a, b), strict=True))
        weights = torch.stack([select(z) for select in self.select]).softmax(0)
        return torch.sum(weights[(..., *[None] * self.dims)] * torch.stack(branches), 0)


class SplitAttention(nn.Module):
    """ResNeSt: groups of one grouped convolution summed and weighed against each other."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.radix, self.c, self.dims = 2, rng.randint(2, 5), dims_of(shape)
        self.reduce = conv_norm_act(rng, shape, 2 * rng.randint(2, 4), 1)
        middle = (self.reduce[0].out_channels, *shape[1:])
        self.conv = conv_norm_act(rng, middle, self.radix * self.c, 3, groups=rng.choice([1, self.radix]))
        self.fc1, self.fc2 = nn.Linear(self.c, 4), nn.Linear(4, self.radix * self.c)

    def forward(self, x):
        x = self.conv(self.reduce(x))
        batch, spatial = x.shape[0], x.shape[2:]
        x = x.reshape((batch, self.radix, x.shape[1] // self.radix, *spatial))
        gap = x.sum(dim=1).flatten(2).mean(2)
        gates = self.fc2(F.relu(self.fc1(gap))).view(batch, self.radix, self.c).softmax(1)
        return (x * gates.reshape((batch, self.radix, self.c, *[1] * self.dims))).sum(dim=1)


class Attention(nn.Module):
    """Self-attention over positions; heads by literal sizes."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.heads, self.head_dim = rng.choice([1, 2, 3]), rng.choice([2, 3, 4])
        inner = self.heads * self.head_dim
        self.qkv, self.proj = nn.Linear(shape[0], 3 * inner, bias=rng.random() < 0.5), nn.Linear(inner, shape[0])
        self.form = rng.choice(["permute", "chunk", "fused"])

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        b, n, _ = tokens.shape
        if self.form == "chunk":
            q, k, v = (t.view(b, n, self.heads, self.head_dim).transpose(1, 2) for t in self.qkv(tokens).chunk(3, -1))
        else:
            q, k, v = self.qkv(tokens).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "fused":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        out = self.proj(out.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))
        return x + out.transpose(1, 2).reshape(x.shape)


class FoldedAttention(nn.Module):
    """Self-attention whose heads are folded into the batch, of a length that `len` tells."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.heads, self.head_dim = rng.choice([1, 2, 3]), rng.choice([2, 3, 4])
        inner = self.heads * self.head_dim
        self.qkv, self.proj = nn.Linear(shape[0], 3 * inner), nn.Linear(inner, shape[0])
        self.bias = nn.Parameter(torch.randn(self.heads, 1, 1)) if rng.random() < 0.5 else None

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        count, n = len(x), tokens.shape[1]
        q, k, v = (
            part.reshape(count, n, self.heads, self.head_dim).transpose(1, 2).reshape(count * self.heads, n, -1)
            for part in self.qkv(tokens).chunk(3, -1)
        )
        scores = torch.bmm(q, k.transpose(1, 2)) / self.head_dim**0.5
        if self.bias is not None:
            scores = scores * self.bias.repeat(len(x), 1, 1)
        out = torch.bmm(scores.softmax(-1), v).view(count, self.heads, n, self.head_dim)
        return x + self.proj(out.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


class PositionsAsChannels(nn.Module):
    """(positions, channels) taken for (channels, positions), on a coarse grid, as in MAnet's attention."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.before = conv_norm_act(rng, shape, width(rng))
        self.after = conv(rng, (self.before[0].out_channels, *shape[1:]), shape[0], 1)
        strides = [1, *(stride for stride in (2, 4) if min(shape[1:]) >= 2 * stride)]  # one place would tell nothing
        self.pool = AVG_POOL[dims_of(shape)](rng.choice(strides), ceil_mode=True)
        self.form = rng.choice(["reshape", "flat", "literal"])

    def forward(self, x):
        x = self.pool(self.before(x))
        rows = x.flatten(2).transpose(1, 2)
        if self.form == "flat":
            rows = rows.reshape(len(x), -1)
        channels = self.before[0].out_channels if self.form == "literal" else x.shape[1]
        return self.after(rows.reshape(x.shape[0], channels, *x.shape[2:]) * x)


class SpatialAttention(nn.Module):
    """CBAM's second half: statistics over channels weigh positions."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.before = conv_norm_act(rng, shape, width(rng))
        self.conv = conv(rng, (2, *shape[1:]), 1, 3)

    def forward(self, x):
        x = self.before(x)
        maps = torch.cat([x.mean(1, keepdim=True), x.max(dim=1, keepdim=True)[0]], dim=1)
        return x * self.conv(maps).sigmoid()


class PositionGate(nn.Module):
    """A convolution to one channel weighs all of them by broadcasting."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.gate = conv(rng, shape, 1)
        self.value = conv(rng, shape, width(rng))

    def forward(self, x):
        return torch.sigmoid(self.gate(x)) * self.value(x) + self.gate(x)


class EfficientChannelAttention(nn.Module):
    """ECA: a convolution along the channels, which are known to it by their places."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.form = rng.choice(["module", "function", "keyword", "image", "not padded"])
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = x.flatten(2).mean(2).unsqueeze(1)
        if self.form == "module":
            y = self.conv(self.conv(y).relu())
        elif self.form == "function":
            y = F.conv1d(y, self.conv.weight, None, 1, 2, 2)
        elif self.form == "keyword":
            y = F.conv1d(input=y, weight=self.conv.weight, padding=1)
        elif self.form == "image":
            y = F.conv2d(y.unsqueeze(3), self.conv.weight.unsqueeze(3), padding=(1, 0)).flatten(2)
        else:
            y = F.conv1d(F.pad(y, (1, 1)), self.conv.weight)
        return x * y.view(x.shape[0], -1, *[1] * (x.ndim - 2)).sigmoid()


class GatedUnit(nn.Module):
    """Gated linear units: one half of the channels weighs the other."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        half = rng.randint(2, 6)
        self.conv = conv(rng, shape, 2 * half)
        self.half = half
        self.form = rng.choice(["glu", "chunk", "view", "maxout", "strided"])

    def forward(self, x):
        x = self.conv(x)
        if self.form == "glu":
            return F.glu(x, dim=1)
        if self.form == "chunk":
            a, b = x.chunk(2, 1)
            return a * torch.sigmoid(b)
        if self.form == "view":
            x = x.view(x.shape[0], 2, self.half, *x.shape[2:])
            return x[:, 0] * x[:, 1].sigmoid()
        if self.form == "maxout":
            return x.view(x.shape[0], self.half, 2, *x.shape[2:]).max(2).values
        return x[:, ::2] + x[:, 1::2]
