"""What a forward costs for each image: noted while it runs, and counted when somebody asks."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from autogate.saliency.sites import Scaling
from rewriters import AutogateError

Kind = Literal["chosen", "follows", "whole"]
"""A layer that has a saliency module; a depthwise one, which computes the channels that aren't zero; any other."""


class Note(NamedTuple):
    """A layer's call.

    Attributes:
        layer: its number.
        positions: of its outputs, over all images.
        scores: (images, channels), less the threshold; None if it has none.
    """

    layer: int
    positions: float
    scores: Tensor | None


class Notes:
    """The calls of layers in the model's latest forward, in their order.

    Attributes:
        all_off: in eval mode no score is positive: for finding out which channels are zero then.
    """

    def __init__(self) -> None:
        self.calls: list[Note] = []
        self.all_off, self._running = False, False

    def begin(self) -> None:
        """A forward begins."""
        self.calls, self._running = [], True

    def end(self) -> None:
        """It is over: what backward computes again, for checkpointing, isn't noted."""
        self._running = False

    @property
    def has_scores(self) -> bool:
        """Whether a forward has been noted that has chosen something."""
        return any(call.scores is not None for call in self.calls)

    def add(self, layer: int, positions: float, scores: Tensor | None = None) -> None:
        """A layer was called."""
        if self._running:
            self.calls.append(Note(layer, positions, scores))

    def code(self, scores: Tensor) -> Tensor:
        """Equation 8 without noise: 1 where a channel is computed."""
        return torch.zeros_like(scores) if self.all_off else (scores.detach() > 0).to(scores.dtype)

    def __getstate__(self) -> dict[str, object]:
        return {"calls": [], "all_off": False, "_running": False}  # a copy has run nothing


@dataclass(frozen=True)
class LayerUse:
    """How the images use the channels of a layer.

    Attributes:
        path: of the convolution.
        never, sometimes, always: number of channels that no image, some or all of them use.
        mean: the share of its channels that an image uses on average.
    """

    path: str
    never: int
    sometimes: int
    always: int
    mean: float


@dataclass(frozen=True)
class MeanUse:
    """What images use of a model on average.

    Attributes:
        images: how many they were.
        share: the share of the FLOPs that an image takes on average.
        layers: those that choose, in the order they run.
    """

    images: int
    share: float
    layers: tuple[LayerUse, ...]


@dataclass(frozen=True, eq=False)
class CountedLayer:
    """A convolution or linear layer, as it is counted.

    Attributes:
        path: of the module.
        kind: what is computed of it.
        taps: multiply-adds of a pair of channels at one position of the output.
        groups: of its channels.
        inputs, outputs: class of each channel, int64; -1 if it always stays.
        own: multiply-adds of its saliency module for one image.
        scaling: where its output is scaled, for one that isn't whole.
        positions: of its outputs for one image of the example.
    """

    path: str
    kind: Kind
    taps: float
    groups: int
    inputs: Tensor = field(repr=False)
    outputs: Tensor = field(repr=False)
    own: int = 0
    scaling: Scaling | None = None
    positions: float = 0.0

    @property
    def dense(self) -> float:
        """Multiply-adds at one position with all channels."""
        return self.taps * len(self.inputs) * len(self.outputs) / self.groups


class Cost(NamedTuple):
    """FLOPs of each image, float64 of shape (images,), and of an image if all channels are computed."""

    images: Tensor
    dense: float


class Fixed(NamedTuple):
    """The share of the FLOPs that every image takes, and the layers that have most of it."""

    share: float
    paths: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Counting:
    """How the forwards of a model are counted.

    Attributes:
        layers: by number.
        zero: bool, shape (classes,): the classes that are zero where all the layers that make them are off.
        rest: FLOPs of one image outside of the layers.
    """

    layers: tuple[CountedLayer, ...]
    zero: Tensor
    rest: float

    @property
    def dense(self) -> float:
        """FLOPs of an image of the example if all channels are computed."""
        return self.rest + sum(layer.positions * layer.dense for layer in self.layers)

    def checksum(self) -> int:
        """The same for two models whose layers are coupled and choose alike, however classes are numbered."""
        number, places = 0, {-1: -1}
        for layer in self.layers:
            number = zlib.crc32(f"{layer.path} {layer.kind} {layer.own}".encode(), number)
            for classes in (layer.inputs.tolist(), layer.outputs.tolist()):
                in_order = [places.setdefault(one, len(places)) for one in classes]
                number = zlib.crc32(repr(in_order).encode(), number)
        return number

    @torch.no_grad()
    def cost(self, calls: Sequence[Note]) -> Cost:
        """What a forward has cost for each image, as inference computes it: without noise.

        A channel that a layer reads counts if some layer before it has made its class for the image, or if it isn't
        zero when all that make it are off.

        Args:
            calls: of one forward; some have scores.

        Raises:
            AutogateError: scores are NaN.
        """
        scored = [call.scores for call in calls if call.scores is not None]
        images, device = len(_rows(scored[0])), scored[0].device
        stays = torch.cat([~self.zero, self.zero.new_ones(1)]).to(device)  # the last entry is that of class -1
        alive = stays.float().repeat(images, 1)
        cost = torch.full((images,), self.rest, dtype=torch.float64, device=device)
        dense = self.rest
        for call in calls:
            layer, positions = self.layers[call.layer], call.positions / images
            dense += positions * layer.dense
            if layer.kind == "whole":
                cost += positions * layer.dense
                continue
            inputs, outputs = layer.inputs.to(device), layer.outputs.to(device)
            read = alive[:, inputs].sum(1, dtype=torch.float64)
            if call.scores is None:
                cost += positions * layer.taps * read
                continue
            made = self._made(call, images)
            cost += positions * layer.taps * read * made.mean(1, dtype=torch.float64).sum(1)
            cost += layer.own * made.shape[1]
            places = outputs.remainder(alive.shape[1]).expand(images, -1)  # a class may be there several times
            alive.scatter_reduce_(1, places, made.any(1).float(), "amax")
        return Cost(cost, dense)

    def _made(self, call: Note, images: int) -> Tensor:
        """Which channels are computed, bool, (images, calls of the layer for each image, channels).

        A layer inside of the model may see several rows for each image: its frames, or the boxes that were found. Where
        their number isn't a multiple of the images', all images count as their mean.
        """
        assert call.scores is not None
        scores = _rows(call.scores)
        if scores.isnan().any():
            raise AutogateError(
                "its saliency scores are NaN.",
                where=self.layers[call.layer].path,
                remedy="Load a checkpoint from before training diverged.",
            )
        made = scores > 0
        if len(made) % images:
            return made.expand(images, -1, -1)
        return made.view(images, -1, made.shape[1])

    def sizes(self, calls: Sequence[Note]) -> dict[str, float]:
        """FLOPs of each layer for one image if all channels are computed, by path."""
        images = next(len(_rows(call.scores)) for call in calls if call.scores is not None)
        found: dict[str, float] = {}
        for call in calls:
            layer = self.layers[call.layer]
            found[layer.path] = found.get(layer.path, 0.0) + call.positions / images * layer.dense
        return found

    def fixed(self, calls: Sequence[Note], most: int = 5) -> Fixed:
        """What every image takes: the layers that run whole, what is no layer, and the saliency modules."""
        sizes = self.sizes(calls)
        whole = {layer.path: sizes.get(layer.path, 0.0) for layer in self.layers if layer.kind == "whole"}
        own = sum(layer.own for layer in self.layers)
        share = (sum(whole.values()) + self.rest + own) / (sum(sizes.values()) + self.rest)
        return Fixed(share, tuple(sorted(whole, key=lambda path: -whole[path])[:most]))


def _rows(scores: Tensor) -> Tensor:
    """Scores as (images, channels), also of a convolution that was called without a batch."""
    return scores if scores.ndim == 2 else scores[None]
