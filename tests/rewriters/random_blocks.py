"""Blocks that random networks are composed of, each with a forward written by hand.

A block is made from a random generator and the shape of its input, without the batch: `Block(rng, shape)`
for shape (channels, *spatial). Most work for one, two and three spatial dimensions. Sizes in the forwards
are plain numbers, as they are in the networks people write.
"""

from __future__ import annotations

import random
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
GLOBAL_POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
GLOBAL_MAX_POOL = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
DROPOUT = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
LINEAR_MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}


def dims_of(shape: Shape) -> int:
    return len(shape) - 1


def conv(rng: random.Random, shape: Shape, out: int, kernel: int | None = None, **options) -> nn.Module:
    """A convolution that keeps the resolution."""
    kernel = kernel or rng.choice([1, 3])
    options.setdefault("bias", rng.random() < 0.5)
    mode = rng.choice(["zeros", "zeros", "zeros", "reflect", "circular"]) if min(shape[1:]) > 1 else "zeros"
    options.setdefault("padding_mode", mode if kernel > 1 else "zeros")
    return CONV[dims_of(shape)](shape[0], out, kernel, padding=kernel // 2, **options)


def norm(rng: random.Random, shape: Shape, channels: int) -> nn.Module:
    """Mostly a batch norm, sometimes one that looks across channels, or none."""
    kind = rng.random()
    if kind < 0.7:
        return NORM[dims_of(shape)](channels, affine=rng.random() < 0.9)
    if kind < 0.78 and prod(shape[1:]) > 1:
        return INSTANCE_NORM[dims_of(shape)](channels, affine=rng.random() < 0.5)
    if kind < 0.82:
        return nn.GroupNorm(rng.choice([g for g in (1, 2, 4) if channels % g == 0]), channels)
    return nn.Identity()


def activation(rng: random.Random, channels: int) -> nn.Module:
    return rng.choice([
        nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.SiLU(inplace=True), nn.GELU(), nn.PReLU(channels), nn.PReLU(),
        nn.Hardswish(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Mish(), nn.ELU(), nn.Softplus(), nn.ReLU6(inplace=True),
        nn.Tanh(), nn.Identity(), nn.Hardtanh(), nn.SELU(), nn.CELU(), nn.Softsign(), nn.Tanhshrink(), nn.Hardsigmoid(),
    ])  # fmt: skip


def conv_norm_act(rng: random.Random, shape: Shape, out: int, kernel: int | None = None, **options) -> nn.Sequential:
    return nn.Sequential(
        conv(rng, shape, out, kernel, **options), norm(rng, shape, out), activation(rng, out)
    )  # fmt: skip


def width(rng: random.Random, *, multiple: int = 1) -> int:
    """A number of channels from 4 to 16."""
    return max(1, rng.randint(4, 16) // multiple) * multiple


def even(shape: Shape) -> bool:
    return shape[0] % 2 == 0


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
        self.pool = rng.choice([
            MAX_POOL[dims](3, 1, 1), AVG_POOL[dims](3, 1, 1), AVG_POOL[dims](3, 1, 1, count_include_pad=False),
        ])  # fmt: skip
        self.conv1 = conv_norm_act(rng, shape, width(rng))
        self.conv2 = conv_norm_act(rng, shape, width(rng))
        self.mode = rng.choice(["nearest", LINEAR_MODE[dims]])

    def forward(self, x):
        small = self.conv1(F.max_pool1d(x, 2) if x.ndim == 3 else x[..., ::2, ::2])
        up = F.interpolate(small, size=x.shape[2:], mode=self.mode)
        return torch.cat([up, self.conv2(self.pool(x))], dim=1)


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


class SpatialAttention(nn.Module):
    """CBAM's second half: statistics over channels, which pin them, weigh positions."""

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


class Unknown(nn.Module):
    """Ops along the channels that nobody has described, or that mix them: all must pin."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.conv = conv(rng, shape, width(rng))
        self.form = rng.choice(["cumprod", "cumsum", "sort", "normalize", "softmax", "logcumsumexp", "max", "norm"])

    def forward(self, x):
        x = self.conv(x)
        if self.form == "cumprod":
            return torch.cumprod(torch.tanh(x), 1)
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


ANY = (
    SharedPlumbing, SharedPair, Halving, Plain, Plain, Preactivated, Residual, Residual, PadShortcut, Dense,
    CrossStage, UnevenSplit, Res2, Ghost, Partial,
    SliceAdd, SqueezeExcite, Depthwise, Grouped, ShuffleUnit, Transposed, Resample, Shared, Pyramid, SelectiveKernel,
    SplitAttention, FunctionalConv, FunctionalLayers, ChannelsLast, Attention, SpatialAttention, PositionGate,
    EfficientChannelAttention, GatedUnit, Rearranged, Unknown, StandardisedConv, Bilinear, Constants, Dropped,
    Branches, TwoStreams, Nested, InstanceScale, Statistics, PreNorm, PreNorm,
)  # fmt: skip
"""Blocks for any number of spatial dimensions."""

IMAGES = (*ANY, PixelShuffle, DynamicConv)
"""Blocks for images."""
