"""Modules whose forward can't be recorded, each for another reason."""

from __future__ import annotations

import random
from collections import namedtuple

import numpy as np
import torch
from torch import Tensor, library, nn

from tests.rewriters.helpers import conv

Pair = namedtuple("Pair", ["first", "second"])


class Pick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x  # the line that the pin must name


class Scale(nn.Module):
    """Asks for a number, with a layer and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.layer = conv(8, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.layer(x) * (1 + abs(x.mean().item()))


class Positive(nn.Module):
    """Zero where x is negative, by the places of those that aren't."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten()
        places = (flat > 0).nonzero().flatten()
        return torch.zeros_like(flat).index_add(0, places, flat[places]).view_as(x)


class Outside(nn.Module):
    """Computes with numpy."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(abs(x.detach().numpy()))


@library.custom_op("opaque_nets::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    return x.flip(-1).clone()


class OwnOp(nn.Module):
    """Calls an op of its own that tells no shapes."""

    def forward(self, x: Tensor) -> Tensor:
        return turned(x)


class Several(nn.Module):
    """Gives tensors in containers, and nothing beside."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> dict[str, object]:
        first, second = pair
        flipped = first if first.sum() > 0 else -first
        return {"both": [flipped, second * 2], "pair": Pair(first + second, None)}


class Number(nn.Module):
    def forward(self, x: Tensor) -> float:
        return x.mean().item()


class Scaled(nn.Module):
    """Its child gives a number, so it can't be told apart from its child."""

    def __init__(self):
        super().__init__()
        self.number = Number()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.number(x)


class Parent(nn.Module):
    """One child can't be recorded, its siblings can."""

    def __init__(self):
        super().__init__()
        self.a, self.pick, self.b, self.c = conv(8, 8), Pick(), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.pick(self.a(x))).relu())


class Borrowing(nn.Module):
    """Calls a layer that belongs elsewhere."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.borrowed = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.borrowed[0](x) if x.isfinite().all() else x


class Drawing(nn.Module):
    """Draws random numbers wherever they come from."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + random.random() + np.random.rand() + torch.rand(()).item())


class Careful(nn.Module):
    """Catches its child's error, and asks for values itself."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong = Wrong()

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.wrong(x)
        except ValueError:
            x = x + 1
        return x if x.sum() > 0 else -x


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("caught")
