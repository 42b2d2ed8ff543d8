"""Forwards written with einops: heads, patches, space to depth, pooling."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from rewriters.labelling.channel_map import Side
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import conv, image


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in parts)
        weights = torch.einsum("b h i d, b h j d -> b h i j", q, k).mul(self.scale).softmax(-1)
        return self.out(rearrange(weights @ v, "b h n d -> b n (h d)"))


class Transformer(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        cut = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4)
        self.patches = nn.Sequential(cut, nn.Linear(48, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Attention(width, 4) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = torch.cat([repeat(self.token, "1 1 d -> b 1 d", b=len(x)), x], 1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x[:, 0])


def test_a_transformer_loses_heads_and_embedding():
    torch.manual_seed(0)
    slimmed = assert_exact(Transformer().double().eval(), (image(size=8).double(),))
    free = slimmed.analysis.channel_map.classes
    assert {Side("token", 2), Side("blocks.0.qkv.weight", 0), Side("blocks.0.qkv.weight", 1)} <= free.keys()
    assert len(free[Side("blocks.0.out.weight", 1)].unique()) == 4  # heads


@pytest.mark.parametrize(
    ("between", "width", "classes"),
    [
        (Rearrange("b c (h s) (w t) -> b (c s t) h w", s=2, t=2), 32, 8),
        (Rearrange("b (c s t) h w -> b c (h s) (w t)", s=2, t=2), 2, 2),
        (Rearrange("b (g c) h w -> b (c g) h w", g=2), 8, 4),
        (Reduce("b c (h s) (w t) -> b c h w", "max", s=2, t=2), 8, 8),
    ],
    ids=str,
)
def test_layers_between_convolutions(between, width, classes):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), between, conv(width, 2)).double().eval()
    assert assert_exact(model, (image().double(),)).analysis.channel_map.size == classes


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(reduce(self.a(x), "b c h w -> b c", "mean") + reduce(x[:, :1], "b c h w -> b c", "max"))


def test_functions_that_reduce():
    torch.manual_seed(0)
    assert assert_exact(Pooled().double().eval(), (image().double(),)).analysis.channel_map.size == 8
