"""Random networks: a recipe says which blocks, a recipe alone says what comes out.

    network = build(Recipe("image", seed=3, blocks=(("Residual", 0), ("CrossStage", 5)), head="pool"))
    network.model(*network.args, **network.kwargs)

`random_recipe(seed)` draws one. A recipe that fails gets smaller by leaving blocks out: every block has a seed of its
own and adapts to the shape it is given.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.rewriters import blocks
from tests.rewriters.blocks import ANY, IMAGES, WAYS
from tests.rewriters.blocks.layers import (
    GLOBAL_MAX_POOL,
    GLOBAL_POOL,
    Shape,
    activation,
    conv,
    conv_norm_act,
    norm,
    width,
)
from tests.rewriters.blocks.residual import PadShortcut

SHAPES: dict[str, Shape] = {"image": (3, 8, 8), "sequence": (4, 8), "volume": (2, 4, 4, 4), "features": (10,)}
HEADS = {
    "image": ("pool", "flatten", "maps", "dict", "two pools", "auxiliary", "views", "keyword"),
    "sequence": ("pool", "flatten", "maps", "dict", "two pools", "auxiliary", "views", "keyword"),
    "volume": ("pool", "flatten", "maps", "dict"),
    "features": ("linear", "dict"),
}


@dataclass(frozen=True)
class Recipe:
    """All there is to say about a random network.

    Attributes:
        kind: "image", "sequence", "volume" or "features" (no spatial dimensions, linear layers only).
        seed: of the weights, the inputs and what is not in the blocks.
        blocks: names of blocks, each with the seed of its own choices.
        head: what happens behind them.
        wiring: "chain", "residual" (every second block is added to where its width allows), "dense" (all
            outputs meet at the end), "two inputs" or "masked" (blocks that take a mask get one).
    """

    kind: str
    seed: int
    blocks: tuple[tuple[str, int], ...]
    head: str
    wiring: str = "chain"


@dataclass(frozen=True)
class Network:
    model: RandomNetwork
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class FeatureBlock(nn.Module):
    """A residual or gated block of linear layers."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        hidden = width(rng, multiple=2)
        self.fc1, self.fc2 = nn.Linear(shape[0], hidden), nn.Linear(hidden, shape[0])
        self.half_in, self.half = nn.Linear(hidden // 2, hidden), hidden // 2
        self.norm = rng.choice([nn.BatchNorm1d(hidden), nn.LayerNorm(hidden), nn.Identity()])
        self.act = activation(rng, hidden)
        self.form = rng.choice(["residual", "plain", "glu", "heads", "matrix", "factor", "cat"])

    def forward(self, x):
        y = self.act(self.norm(self.fc1(x)))
        if self.form == "glu":
            a, b = y.chunk(2, dim=-1)
            y = self.half_in(a * b.sigmoid())
        elif self.form == "heads":
            y = y.view(-1, 2, self.half)
            y = (y * torch.softmax(y.mean(-1, keepdim=True), 1)).flatten(1)
        elif self.form == "matrix":
            return torch.addmm(self.fc2.bias, y, self.fc2.weight.t())
        elif self.form == "factor":
            y = F.linear(y, self.half_in.weight.t()) @ self.half_in.weight.T
        elif self.form == "cat":
            return torch.cat([x, y, torch.relu(y)], -1)
        return self.fc2(y) if self.form == "plain" else x + self.fc2(y)


FEATURES = (FeatureBlock,)
KINDS = {"image": IMAGES, "sequence": ANY, "volume": ANY, "features": FEATURES}


def block_class(name: str) -> type[nn.Module]:
    return FeatureBlock if name == "FeatureBlock" else getattr(blocks, name)


class Stem(nn.Module):
    """First layer; takes one tensor, or two, the second of which is optional."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        out = width(rng)
        self.first = conv_norm_act(rng, shape, out, 3) if len(shape) > 1 else nn.Linear(shape[0], out)
        self.second = conv(rng, shape, out) if len(shape) > 1 else nn.Linear(shape[0], out)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.first(x)
        if other is not None:
            y = y + self.second(other)
        return y


class Body(nn.Module):
    """Blocks one after the other, with the connections that the wiring asks for."""

    def __init__(self, rng: random.Random, shape: Shape, blocks: list[type[nn.Module]], seeds: list[int], wiring: str):
        super().__init__()
        self.blocks = nn.ModuleList()
        self.fits: list[bool] = []
        self.wiring = wiring
        for block, seed in zip(blocks, seeds, strict=True):
            if shape[0] > 24:
                self._append(_transition(rng, shape), shape)
                shape = self.shape
            if block is PadShortcut and min(shape[1:]) < 4:
                continue
            self._append(block(random.Random(seed), shape), shape)
            shape = self.shape
        self.shape = shape

    def _append(self, block: nn.Module, shape: Shape) -> None:
        with torch.no_grad():
            self.shape = tuple(block.eval()(torch.zeros(2, *shape)).shape[1:])
        self.blocks.append(block)
        self.fits.append(self.shape == shape)

    def forward(self, x, mask: Tensor | None = None):
        seen = []
        for block, fits in zip(self.blocks, self.fits, strict=True):
            y = block(x, mask) if getattr(block, "takes_mask", False) else block(x)
            x = x + y if fits and self.wiring == "residual" else y
            seen.append(x)
        return seen if self.wiring == "dense" else x


def _transition(rng: random.Random, shape: Shape) -> nn.Module:
    out = width(rng)
    if len(shape) == 1:
        return nn.Linear(shape[0], out)
    return nn.Sequential(norm(rng, shape, shape[0]), conv(rng, shape, out, 1))


class Head(nn.Module):
    """From a map to what the network returns."""

    def __init__(self, rng: random.Random, shape: Shape, form: str):
        super().__init__()
        self.form, self.dims = form, len(shape) - 1
        self.any_size = form not in ("flatten", "views")  # these hold the size of the example
        flat = 1
        for size in shape:
            flat *= size
        self.flat = flat
        self.channels = shape[0]
        if form == "flatten":
            self.fc = nn.Linear(flat, 5)
        elif form == "views":
            self.fc = nn.Linear(flat, 12)
            self.after = nn.Linear(4, 3)
        elif form == "two pools":
            self.fc = nn.Linear(2 * shape[0], 5)
        else:
            self.fc = nn.Linear(shape[0], 5)
        if self.dims:
            self.pool, self.max_pool = GLOBAL_POOL[self.dims](1), GLOBAL_MAX_POOL[self.dims](1)
            self.last = conv(rng, shape, 3)
        self.bn = nn.BatchNorm1d(shape[0]) if rng.random() < 0.3 else nn.Identity()

    def forward(self, x: Tensor, return_maps: bool = False):
        if self.form == "linear":
            return self.fc(x)
        if self.form == "dict" and not self.dims:
            return {"out": self.fc(x), "features": x}
        if self.form == "flatten":
            return self.fc(x.flatten(1))
        if self.form == "views":
            y = self.fc(x.reshape(-1, self.flat)).view(-1, 3, 4)
            return self.after(y).unflatten(2, (1, 3)).mean(1)
        if self.form == "maps":
            return self.last(x)
        if self.form == "two pools":
            return self.fc(torch.cat([self.pool(x), self.max_pool(x)], 1).flatten(1))
        pooled = self.bn(self.pool(x).view(x.shape[0], -1))
        if self.form == "dict":
            return {"logits": self.fc(pooled), "more": (x, [pooled])} if return_maps else {"logits": self.fc(pooled)}
        return (self.fc(pooled), self.last(x)) if return_maps else self.fc(pooled)


class RandomNetwork(nn.Module):
    """Stem, body, head, and an auxiliary head that only runs in train mode.

    Attributes:
        any_size: whether the network takes inputs of other spatial sizes: no block and no head holds the example's.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        rng = random.Random(recipe.seed)
        shape = SHAPES[recipe.kind]
        self.stem = Stem(rng, shape)
        with torch.no_grad():
            shape = tuple(self.stem.eval()(torch.zeros(2, *shape)).shape[1:])
        names, seeds = [block_class(name) for name, _ in recipe.blocks], [seed for _, seed in recipe.blocks]
        self.body = Body(rng, shape, names, seeds, recipe.wiring)
        self.dense = recipe.wiring == "dense" and len(self.body.blocks) > 0
        if self.dense:
            self.gather = Gather([tuple(y.shape[1:]) for y in self.body(torch.zeros(2, *shape))])
            shape = self.gather.shape
        else:
            shape = self.body.shape
        self.head = Head(rng, shape, recipe.head)
        self.aux = Auxiliary(rng, shape) if recipe.head == "auxiliary" else None
        self.any_size = all(getattr(part, "any_size", True) for part in self.modules())

    def forward(self, x: Tensor, other: Tensor | None = None, *, return_maps: bool = False, mask: Tensor | None = None):
        x = self.stem(x) if other is None else self.stem(x, other=other)
        x = self.body(x, mask)
        if self.dense:
            x = self.gather(x)
        out = self.head(x, return_maps)
        if self.aux is not None and self.training:
            return out, self.aux(x)
        return out


class Gather(nn.Module):
    """Brings features of several resolutions to the last one's and concatenates them."""

    def __init__(self, shapes: list[Shape]):
        super().__init__()
        self.shape = (sum(shape[0] for shape in shapes), *shapes[-1][1:])

    def forward(self, features: list[Tensor]) -> Tensor:
        if features[0].ndim == 2:
            return torch.cat(features, 1)
        size = features[-1].shape[2:]
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
        return torch.cat([f if f.shape[2:] == size else pool(f, tuple(size)) for f in features], 1)


class Auxiliary(nn.Module):
    """A head of its own, seen by no forward in eval mode."""

    def __init__(self, rng: random.Random, shape: Shape):
        super().__init__()
        self.conv = conv_norm_act(rng, shape, width(rng))
        self.fc = nn.Linear(self.conv[0].out_channels, 5)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(2).mean(2))


def build(recipe: Recipe) -> Network:
    """The network of a recipe in float64 and eval mode, with example inputs for a batch of two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = RandomNetwork(recipe).double().eval()
        _randomise_statistics(model)
    return Network(model, *inputs(recipe, batch=2))


def inputs(recipe: Recipe, batch: int, more: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of a recipe's network; `more` is added to every spatial size."""
    channels, *spatial = SHAPES[recipe.kind]
    shape = (batch, channels, *(size + more for size in spatial))
    generator = torch.Generator().manual_seed(recipe.seed + batch)
    args = [torch.randn(shape, generator=generator, dtype=torch.float64)]
    kwargs: dict[str, Any] = {}
    if recipe.wiring == "two inputs":
        kwargs["other"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    if recipe.wiring == "masked":
        mask = torch.rand((batch, *[1] * len(spatial), 1), generator=generator)
        kwargs["mask"] = mask > 0.5
    if recipe.head in ("keyword", "dict") and recipe.kind != "features":
        kwargs["return_maps"] = recipe.seed % 2 == 0
    return tuple(args), kwargs


def ways(recipe: Recipe, network: Network, batch: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Inputs of a batch for each way through a network: optional ones given and left out, short ones and long ones."""
    found = []
    twice = SHAPES[recipe.kind][-1]
    for more in (0, twice) if network.model.any_size else (0,):
        args, kwargs = inputs(recipe, batch, more)
        found.append((args, kwargs))
        if kwargs.keys() & {"mask", "other"}:
            found.append((args, {key: value for key, value in kwargs.items() if key not in ("mask", "other")}))
        if "return_maps" in kwargs:
            found.append((args, kwargs | {"return_maps": not kwargs["return_maps"]}))
    return found


def _randomise_statistics(model: nn.Module) -> None:
    """Norms as they are after training: neither their statistics nor their vectors are zero or one."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.elementwise_affine:
                module.weight.uniform_(0.5, 1.5)


def random_recipe(seed: int) -> Recipe:
    """One recipe for each seed."""
    rng = random.Random(seed)
    kind = rng.choices(["image", "sequence", "volume", "features"], [12, 3, 2, 1])[0]
    names = [block.__name__ for block in KINDS[kind]]
    blocks = tuple((rng.choice(names), rng.randrange(1000)) for _ in range(rng.randint(1, 4)))
    wiring = rng.choice(["chain", "chain", "residual", "dense", "two inputs"])
    return Recipe(kind, rng.randrange(1000), blocks, rng.choice(HEADS[kind]), wiring)


def recipe_with_ways(seed: int) -> Recipe:
    """A recipe with blocks that take several ways, and an argument that decides some."""
    recipe, rng = random_recipe(seed), random.Random(-seed - 1)
    if recipe.kind == "features":
        recipe = replace(recipe, kind="sequence", blocks=(), head="pool")
    blocks = list(recipe.blocks[:2])
    for _ in range(rng.randint(1, 2)):
        blocks.insert(rng.randint(0, len(blocks)), (rng.choice(WAYS).__name__, rng.randrange(1000)))
    wiring = rng.choice(["masked", "masked", "two inputs", recipe.wiring])
    return replace(recipe, blocks=tuple(blocks), wiring=wiring)


def deep_recipe(seed: int) -> Recipe:
    """A recipe for hundreds of layers."""
    rng = random.Random(seed)
    names = [block.__name__ for block in IMAGES]
    blocks = tuple((rng.choice(names), rng.randrange(1000)) for _ in range(60))
    return Recipe("image", rng.randrange(1000), blocks, "pool", rng.choice(["chain", "residual"]))
