"""Small slim models to save and load."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import autogate
from benchmarks.parts import kill, randomise_norms
from tests.rewriters.helpers import conv, image

PIXELS = 64


def slimmed(model: nn.Module, inputs: Any, share: float = 0.4, seed: int = 0, **options: Any) -> nn.Module:
    model = autogate.prepare(model, inputs, flops=1.0, **options)
    kill(model, share, seed)
    return autogate.finalize(model, warn=False)


def build(name: str = "resnet18", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    randomise_norms(model)
    return model


def example(dtype: torch.dtype = torch.float32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1)).to(dtype)


def small() -> nn.Module:
    """Two convolutions and a classifier, quick to slim and to save."""
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))


def slim_small(seed: int = 0) -> nn.Module:
    return slimmed(small(), image(), seed=seed).eval()


@torch.no_grad()
def outputs(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    given = model.eval()(*args, **kwargs)
    return list(given) if isinstance(given, (list, tuple)) else [given]
