"""Idioms of forwards: containers with fields, code for one mode, sizes, options, lists of tensors, repeated calls."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.rewriters.blocks.layers import Shape, conv, conv_norm_act, width


class Named(NamedTuple):
    first: Tensor
    rest: list[Tensor]


@dataclass
class Fields:
    first: Tensor
    rest: list[Tensor]


class Output(OrderedDict):
    """A dictionary whose entries are attributes too, as Hugging Face's ModelOutput."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


CONTAINERS = {"named": Named, "fields": Fields, "output": lambda first, rest: Output(first=first, rest=rest)}


class Halves(nn.Module):
    """A forward that holds a size, with options; without parameters, so that it may be called on anything."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0):
        first, second = x.chunk(2, 1)
        if mask is not None:
            first = first.masked_fill(mask, 0.5)
        return CONTAINERS[self.form](first, [second * scale])


class Returned(nn.Module):
    """A module that returns fields, called several times with options and without."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.convs = nn.ModuleList(conv_norm_act(rng, shape, width(rng, multiple=2)) for _ in range(2))
        self.halves = Halves(rng.choice(list(CONTAINERS)))
        self.masked, self.scale = rng.random() < 0.5, rng.choice([1.0, 0.5])

    def forward(self, x: Tensor) -> Tensor:
        first = self.halves(self.convs[0](x))
        mask = x[:, :1] > 0 if self.masked else None
        second = self.halves(self.convs[1](x), mask=mask, scale=self.scale)
        return torch.cat([*first.rest, second.first, first.first, second.rest[0]], 1)


class TrainOnly(nn.Module):
    """Code that runs in train mode alone, on channels."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.half = rng.randint(2, 5)
        self.before, self.after = (
            conv_norm_act(rng, shape, 2 * self.half),
            conv(rng, (2 * self.half, *shape[1:]), width(rng)),
        )
        self.register_buffer("factor", torch.rand(2 * self.half, *[1] * (len(shape) - 1)))
        self.form = rng.choice(["swap", "slices", "factor", "mean", "softmax"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.training:
            if self.form == "swap":
                x = torch.cat(x.chunk(2, 1)[::-1], 1)
            elif self.form == "slices":
                x = torch.cat([x[:, : self.half].tanh(), x[:, self.half :]], 1)
            elif self.form == "factor":
                x = x * self.factor
            elif self.form == "mean":
                x = x - x.mean(1, keepdim=True)
            else:
                x = x.softmax(1)
        return self.after(x)


class Popped(nn.Module):
    """A list of tensors that is consumed from its end, by one module that is called for each of them."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        c = width(rng)
        self.steps, inner = nn.ModuleList(conv_norm_act(rng, shape, c) for _ in range(3)), (2 * c, *shape[1:])
        self.join = conv(rng, inner, c)
        self.form = rng.choice(["pop", "index", "zip"])

    def forward(self, x: Tensor) -> Tensor:
        seen = [step(x) for step in self.steps]
        if self.form == "zip":
            y = seen[0]
            for step, skip in zip(self.steps[1:], seen[1:], strict=True):
                y = self.join(torch.cat([y, skip + step(x)], 1)).relu()
            return y
        y = seen.pop()
        for index in range(len(seen)):
            y = self.join(torch.cat([y, seen.pop() if self.form == "pop" else seen[-1 - index]], 1)).relu()
        return y


class Sized(nn.Module):
    """Sizes that a forward reads: tokens, positions, masks, tables that are resized."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.half = rng.randint(2, 5)
        self.before = conv_norm_act(rng, shape, 2 * self.half)
        self.table = nn.Parameter(torch.randn(1, 2 * self.half, 5))
        self.form = rng.choice(["tokens", "causal", "table", "ramp", "zeros"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        b, c, *spatial = x.shape
        flat = x.flatten(2)
        n = flat.shape[-1]
        if self.form == "tokens":
            flat = flat.reshape(b, 2, c // 2, n).transpose(1, 2).reshape(b, c, n)
        elif self.form == "causal":
            scores = flat.transpose(1, 2) @ flat / n**0.5
            mask = torch.ones(n, n, dtype=torch.bool).triu(1)
            flat = flat @ scores.masked_fill(mask, -1e4).softmax(-1).transpose(1, 2)
        elif self.form == "table":
            flat = flat + F.interpolate(self.table, size=n, mode="linear")
        elif self.form == "ramp":
            flat = flat * torch.arange(1, n + 1, dtype=x.dtype).div(n)
        else:
            flat = torch.cat([flat[:, : self.half], x.new_zeros(b, 1, n), flat[:, self.half :]], 1)
        return flat.view(b, -1, *spatial)
