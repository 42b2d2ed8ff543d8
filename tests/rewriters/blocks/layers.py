"""The layers that blocks are made of, drawn at random."""

from __future__ import annotations

import random
from math import prod

from torch import nn

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
