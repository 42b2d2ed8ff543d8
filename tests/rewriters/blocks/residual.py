"""Adds: plain and residual blocks, in the ways shortcuts are written."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

from tests.rewriters.blocks.convolutions import Depthwise
from tests.rewriters.blocks.gating import SqueezeExcite
from tests.rewriters.blocks.joins import CrossStage, Partial, Res2, SliceAdd
from tests.rewriters.blocks.layers import (
    AVG_POOL,
    CONV,
    DROPOUT,
    LINEAR_MODE,
    MAX_POOL,
    NORM,
    TRANSPOSED,
    Shape,
    activation,
    conv,
    conv_norm_act,
    dims_of,
    norm,
    width,
)


class Plain(nn.Module):
    """Convolution, norm, activation, sometimes with a stride."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        out = width(rng)
        stride = 2 if min(shape[1:]) >= 4 and rng.random() < 0.4 else 1
        self.conv = CONV[dims_of(shape)](shape[0], out, 3, stride=stride, padding=1, bias=rng.random() < 0.5)
        self.norm, self.act = norm(rng, shape, out), activation(rng, out)
        self.norm_first = rng.random() < 0.7

    def forward(self, x):
        x = self.conv(x)
        return self.act(self.norm(x)) if self.norm_first else self.norm(self.act(x))


class Preactivated(nn.Module):
    """Norm and activation before the convolution, as in pre-activation ResNets and DenseNets."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.norm, self.act = norm(rng, shape, shape[0]), activation(rng, shape[0])
        self.conv = conv(rng, shape, width(rng))

    def forward(self, x):
        return self.conv(self.act(self.norm(x.clone())))


class Residual(nn.Module):
    """x + branch(x) in the ways it is written, with a projection where widths differ."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        out = rng.choice([shape[0], width(rng)])
        self.branch = nn.Sequential(conv_norm_act(rng, shape, width(rng)))
        self.branch.append(conv(rng, (self.branch[0][0].out_channels, *shape[1:]), out))
        self.branch.append(norm(rng, shape, out))
        self.downsample = None if out == shape[0] else nn.Sequential(conv(rng, shape, out, 1), norm(rng, shape, out))
        self.act = activation(rng, out)
        self.drop = nn.Dropout(0.2)
        self.form = rng.choice(["plus", "in place", "torch.add", "scaled", "alpha", "method", "reversed"])
        scale_shape = rng.choice([(out, *[1] * dims_of(shape)), (1, out, *[1] * dims_of(shape)), (1,)])
        self.scale = nn.Parameter(torch.rand(scale_shape)) if self.form == "scaled" else None

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.drop(self.branch(x))
        if self.form == "in place":
            y += shortcut
        elif self.form == "torch.add":
            y = torch.add(y, shortcut)
        elif self.form == "scaled":
            y = shortcut + self.scale * y
        elif self.form == "alpha":
            y = shortcut.add(y, alpha=0.5)
        elif self.form == "method":
            y = y.add_(shortcut).mul_(0.7)
        elif self.form == "reversed":
            y = shortcut - y
        else:
            y = y + shortcut
        return self.act(y)


class PadShortcut(nn.Module):
    """ResNet's option A: a strided shortcut, padded with zero channels."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.before, self.after = rng.randint(0, 3), rng.randint(0, 3)
        out = shape[0] + self.before + self.after
        self.conv = CONV[dims_of(shape)](shape[0], out, 3, stride=2, padding=1)
        self.bn = NORM[dims_of(shape)](out)
        self.dims = dims_of(shape)
        self.how = rng.choice(["pad", "nn.functional", "zeros", "new_zeros", "zeros_like", "module"])
        self.pad = nn.ConstantPad3d((0, 0) * self.dims + (self.before, self.after) + (0, 0) * (2 - self.dims), 0.0)

    def shortcut(self, x):
        x = x[(slice(None), slice(None), *[slice(None, None, 2)] * self.dims)]
        if self.how == "module":
            return self.pad(x)
        if self.how == "pad":
            return F.pad(x, (0, 0) * self.dims + (self.before, self.after))
        if self.how == "nn.functional":
            return torch.nn.functional.pad(x, [0, 0] * self.dims + [self.before, self.after], "constant", 0)
        if self.how == "zeros":
            zeros = [
                torch.zeros(x.shape[0], n, *x.shape[2:], dtype=x.dtype, device=x.device)
                for n in (self.before, self.after)
            ]
        elif self.how == "new_zeros":
            zeros = [x.new_zeros((x.shape[0], n, *x.shape[2:])) for n in (self.before, self.after)]
        else:
            zeros = [torch.zeros_like(x[:, :n]) for n in (self.before, self.after)]
            zeros[1] = x.new_zeros(x.shape[0], self.before + self.after - zeros[0].shape[1], *x.shape[2:])
        return torch.cat([zeros[0], x, zeros[1]], dim=1)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + self.shortcut(x))


class Transposed(nn.Module):
    """Transposed convolutions, plain, grouped and depthwise, with cropping or pooling behind them."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        dims = dims_of(shape)
        groups, into, out = rng.choice([1, 1, 2, 4]), rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
        self.reduce = conv_norm_act(rng, shape, 4 * groups if groups == 1 else groups * into, 1)
        middle = self.reduce[0].out_channels
        after = width(rng) if groups == 1 else groups * out
        self.up = TRANSPOSED[dims](middle, after, 2, stride=2, groups=groups, bias=rng.random() < 0.5)
        self.norm, self.act = norm(rng, shape, after), activation(rng, after)
        self.down = rng.choice([MAX_POOL[dims](2), AVG_POOL[dims](2), MAX_POOL[dims](3, 2, 1)])

    def forward(self, x):
        return self.down(self.act(self.norm(self.up(self.reduce(x)))))


class Resample(nn.Module):
    """Pooling and resizing beside one another (Inception, U-Net)."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        dims = dims_of(shape)
        averages = [AVG_POOL[dims](3, 1, 1), AVG_POOL[dims](3, 1, 1, count_include_pad=False)]
        small = dims == 3 and min(shape[1:]) < 3  # avg_pool3d takes nothing smaller than its kernel, padded or not
        self.pool = rng.choice([MAX_POOL[dims](3, 1, 1), *([] if small else averages)])
        self.conv1 = conv_norm_act(rng, shape, width(rng))
        self.conv2 = conv_norm_act(rng, shape, width(rng))
        self.mode = rng.choice(["nearest", LINEAR_MODE[dims]])

    def forward(self, x):
        small = self.conv1(F.max_pool1d(x, 2) if x.ndim == 3 else x[..., ::2, ::2])
        up = F.interpolate(small, size=x.shape[2:], mode=self.mode)
        return torch.cat([up, self.conv2(self.pool(x))], dim=1)


class Pyramid(nn.Module):
    """One head over several scales, as detectors share theirs."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.lateral = nn.ModuleList(conv(rng, shape, 6) for _ in range(2))
        self.head = nn.Sequential(conv_norm_act(rng, (6, *shape[1:]), width(rng)))
        self.splits = rng.random() < 0.5

    def forward(self, x):
        levels = [lateral(x) for lateral in self.lateral]
        outs = [self.head(level) for level in levels]
        if self.splits:
            outs = [part for out in outs for part in out.chunk(2, 1)]
        return torch.cat(outs, 1)


class Dropped(nn.Module):
    """Dropout in its forms, and stochastic depth, which only acts in train mode."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.conv = conv_norm_act(rng, shape, shape[0])
        self.drop = rng.choice([nn.Dropout(0.3), DROPOUT[dims_of(shape)](0.3), nn.AlphaDropout(0.2), nn.Identity()])

    def forward(self, x):
        y = self.drop(self.conv(x))
        if self.training:
            keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype) < 0.8
            y = y * keep / 0.8
        return F.dropout(x, 0.1, self.training) + y


class Branches(nn.Module):
    """Parallel branches summed, averaged, multiplied or concatenated, held in containers."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.form = rng.choice(["sum", "stack mean", "product", "cat", "max", "weighted"])
        out = width(rng)
        self.branches = nn.ModuleDict({name: conv_norm_act(rng, shape, out) for name in ("left", "right", "middle")})
        self.weights = nn.Parameter(torch.rand(3))

    def forward(self, x):
        outs = {name: branch(x) for name, branch in self.branches.items()}
        if self.form == "sum":
            return sum(outs.values())
        if self.form == "stack mean":
            return torch.stack(list(outs.values()), dim=-1).mean(dim=-1)
        if self.form == "product":
            return outs["left"] * outs["right"].sigmoid() + outs["middle"]
        if self.form == "max":
            return torch.maximum(outs["left"], torch.max(outs["right"], outs["middle"]))
        if self.form == "weighted":
            return sum(w * y for w, y in zip(self.weights.softmax(0), outs.values(), strict=True))
        return torch.cat(list(outs.values()), dim=1)


class Pair(nn.Module):
    """Takes and gives several tensors, and an optional argument."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.a, self.b = conv(rng, shape, shape[0]), conv(rng, shape, shape[0])

    def forward(self, pair, *, skip=None, scale: float = 1.0):
        first, second = pair
        first, second = self.a(second), self.b(first) * scale
        return {"first": first if skip is None else first + skip, "rest": [second]}


class TwoStreams(nn.Module):
    """Modules that pass lists, dictionaries and keyword arguments between each other."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.start = conv(rng, shape, 2 * shape[0])
        self.pairs = nn.ModuleList(Pair(rng, shape) for _ in range(2))
        self.c = shape[0]

    def forward(self, x):
        streams = list(torch.split(self.start(x), [self.c, self.c], dim=1))
        out = self.pairs[0](streams)
        out = self.pairs[1]([out["first"], out["rest"][0]], skip=x, scale=0.5)
        return torch.cat([out["first"], *out["rest"]], dim=1)


class Nested(nn.Module):
    """Blocks inside blocks; the outer forward holds a size of its own."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.half = rng.randint(2, 5)
        self.conv = conv(rng, shape, 2 * self.half)
        inner = (self.half, *shape[1:])
        kinds = [Residual, SqueezeExcite, Depthwise, SliceAdd, Partial, Res2, TwoStreams, CrossStage]
        self.blocks = nn.ModuleList(rng.choice(kinds)(rng, inner) for _ in range(2))

    def forward(self, x):
        x = self.conv(x)
        first, second = x[:, : self.half], x[:, self.half :]
        return torch.cat([self.blocks[0](first), self.blocks[1](second)], 1)
