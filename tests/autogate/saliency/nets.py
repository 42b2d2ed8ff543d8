"""Small networks for the tests of saliency modules, and scores that close some of their channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, LayerNorm2d
from torch import Tensor, nn

from autogate.saliency import saliency_of

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """A stem, a residual add, a depthwise convolution, a concatenation, and a linear layer.

    SiLU is zero at zero, and nowhere else by chance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.branch = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), BatchNormAct2d(24, act_layer=nn.SiLU))
        self.depthwise = nn.Sequential(nn.Conv2d(24, 24, 3, 2, 1, groups=24), nn.BatchNorm2d(24), nn.SiLU())
        self.project = nn.Conv2d(24, 16, 1)
        self.down = nn.Conv2d(16, 16, 2, 2)
        self.left = nn.Sequential(nn.Conv2d(16, 20, 3, padding=1), LayerNorm2d(20), nn.SiLU())
        self.join, self.head = nn.Conv2d(36, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.down(x) + self.project(self.depthwise(self.branch(x)))
        return self.head(self.join(torch.cat([x, self.left(x)], 1)).mean((2, 3)))


class Tokens(nn.Module):
    """Patches as tokens: an MLP on (images, tokens, channels), a gated one on (images, rows, columns, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norms = nn.Conv2d(3, 16, 2, 2), nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.gate, self.value, self.out = nn.Linear(16, 20), nn.Linear(16, 20, bias=False), nn.Linear(20, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        y = self.norms[0](x.flatten(1, 2))
        x = x + self.fc2(F.gelu(self.fc1(y))).view(x.shape)
        y = self.norms[1](x)
        return self.head((x + self.out(F.silu(self.gate(y)) * self.value(y))).mean((1, 2)))


def chain() -> nn.Sequential:
    """Three convolutions, each with another norm or none."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 24, 3, padding=1), nn.SiLU(),
        nn.Conv2d(24, 16, 3, padding=1), LayerNorm2d(16), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


def lively(model: nn.Module) -> nn.Module:
    """The model with norms that aren't the identity."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.bias.normal_(0, 0.3)
                module.weight.uniform_(0.5, 1.5)
    return model.eval()


def choose(model: nn.Module, seed: int = 0, closed: float = 1.0) -> None:
    """Write weights into the saliency modules so that they close other channels for each image."""
    bank = saliency_of(model)
    assert bank is not None
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in bank.saliency_modules:
            module.expand.weight.normal_(0, 3, generator=random).div_(module.sharpness)
            module.expand.bias.normal_(-closed, 1, generator=random).div_(module.sharpness)
