"""What a forward costs for each image: noted while it runs, and counted when somebody asks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from autogate.saliency.kinds import Kind
from autogate.saliency.sites import Scaling
from rewriters import AutogateError


class Note(NamedTuple):
    """A layer's call.

    Attributes:
        layer: its number.
        positions: of its outputs, over all images.
        scores: the decisive values, (images, channels); None if it has none.
        made: bool, of that shape: the channels that are computed, as in inference; None if it has no scores.
    """

    layer: int
    positions: float
    scores: Tensor | None = None
    made: Tensor | None = None


class Notes:
    """The calls of layers in the model's latest forward, in their order.

    Attributes:
        running: whether a forward of the whole model runs.
        alive: bool, (images, classes + 1): the classes that some layer has made so far in this forward, for those who
            skip what is zero; None before the first.
        chosen: the channels that a layer has computed so far in this forward, by its number, int64: of layers that saw
            one image, and whose channels other layers don't add to. These aren't in `alive`.
        untold: a layer has run that doesn't say what it makes.
        allowed: the channels that the images that run now may use, by the number of each layer, bool of shape
            (channels,) or (images, channels); None if their own codes decide. They run together, and compute what any
            of them uses.
    """

    def __init__(self) -> None:
        self.calls: list[Note] = []
        self.alive: Tensor | None = None
        self.chosen: dict[int | None, Tensor] = {}
        self.allowed: Mapping[int, Tensor] | None = None
        self.running, self.untold = False, False

    def begin(self) -> None:
        """A forward begins."""
        self.calls, self.alive, self.chosen, self.running, self.untold = [], None, {}, True, False

    def end(self) -> None:
        """It is over: what backward computes again, for checkpointing, isn't noted."""
        self.running, self.alive, self.chosen = False, None, {}

    @property
    def has_scores(self) -> bool:
        """Whether a forward has been noted that has chosen something."""
        return any(call.scores is not None for call in self.calls)

    def add(self, note: Note) -> None:
        """A layer was called."""
        if self.running:
            self.calls.append(note)

    def code(self, layer: int, scores: Tensor, threshold: Tensor | float = 0.0) -> Tensor:
        """Equation 8 without noise: whether a channel is computed, bool."""
        made = scores > threshold
        if self.allowed is not None and layer in self.allowed:
            made = made & self.allowed[layer]
        return made

    def made(self, open: Tensor) -> Tensor:
        """The channels that are computed, of those that aren't zero: if images run together, those of any of them."""
        return open if self.allowed is None else open.any(0).expand_as(open)

    def __getstate__(self) -> dict[str, object]:
        return vars(Notes())  # a copy has run nothing


@dataclass(frozen=True)
class LayerUse:
    """How the images use the channels of a layer.

    Attributes:
        path: of the layer.
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
        scaling: where its output is scaled, for one that chooses or follows.
        positions: of its outputs for one image of the example.
        prepared: pairs of channels that it had when the model was prepared; None: those that it has.
        why: why it doesn't choose, if others like it do.
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
    prepared: float | None = None
    why: str = ""

    @property
    def left(self) -> float:
        """Multiply-adds at one position with all channels that it has."""
        return self.taps * len(self.inputs) * len(self.outputs) / self.groups

    @property
    def dense(self) -> float:
        """The same with all channels that it had when the model was prepared."""
        return self.left if self.prepared is None else self.taps * self.prepared


class Cost(NamedTuple):
    """FLOPs of each image, float64 of shape (images,), and of an image in the model as it was prepared."""

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
        prepared_rest: those of the model as it was prepared; None: the same.
    """

    layers: tuple[CountedLayer, ...]
    zero: Tensor
    rest: float
    prepared_rest: float | None = None

    @property
    def dense(self) -> float:
        """FLOPs of an image of the example in the model as it was prepared."""
        rest = self.rest if self.prepared_rest is None else self.prepared_rest
        return rest + sum(layer.positions * layer.dense for layer in self.layers)

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
            AutogateError: scores are NaN or infinite.
        """
        scored = [call.scores for call in calls if call.scores is not None]
        images, device = len(_rows(scored[0])), scored[0].device
        stays = torch.cat([~self.zero, self.zero.new_ones(1)]).to(device)  # the last entry is that of class -1
        alive = stays.float().repeat(images, 1)
        cost = torch.full((images,), self.rest, dtype=torch.float64, device=device)
        dense = self.rest if self.prepared_rest is None else self.prepared_rest
        for call in calls:
            layer, positions = self.layers[call.layer], call.positions / images
            dense += positions * layer.dense
            if layer.kind == "whole":
                cost += positions * layer.left
                continue
            inputs, outputs = layer.inputs.to(device), layer.outputs.to(device)
            read = alive[:, inputs].sum(1, dtype=torch.float64)
            if call.scores is None:
                made = 1.0 if layer.groups > 1 else alive[:, outputs].sum(1, dtype=torch.float64)
                cost += positions * layer.taps * read * made
                continue
            made = self._made(call, images)
            cost += positions * layer.taps * read * made.mean(1, dtype=torch.float64).sum(1)
            cost += layer.own * made.shape[1]
            places = outputs.remainder(alive.shape[1]).expand(images, -1)  # a class may be there several times
            alive.scatter_reduce_(1, places, made.any(1).float(), "amax")
        return Cost(cost, dense)

    def computed(self, calls: Sequence[Note]) -> Tensor:
        """How many channels of the layers that choose a forward has computed for each image, float64, (images,)."""
        scored = [call for call in calls if call.scores is not None]
        images = next(len(_rows(call.scores)) for call in scored if call.scores is not None)
        return torch.stack([self._made(call, images).mean(1, dtype=torch.float64).sum(1) for call in scored]).sum(0)

    def _made(self, call: Note, images: int) -> Tensor:
        """Which channels are computed, bool, (images, calls of the layer for each image, channels).

        A layer inside of the model may see several rows for each image: its frames, or the boxes that were found. Where
        their number isn't a multiple of the images', all images count as their mean.
        """
        assert call.scores is not None and call.made is not None
        if not (call.scores < torch.inf).all():  # at minus infinity a channel is off
            raise AutogateError(
                "its saliency scores are NaN or infinite.",
                where=self.layers[call.layer].path,
                remedy="Normalise the inputs as in training; if training diverged, load a checkpoint from before that.",
            )
        made = _rows(call.made)
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
    """Scores or codes as (images, channels), also of a layer that was called without a batch."""
    return scores if scores.ndim == 2 else scores[None]
