"""Which layers read the channels of one other layer alone: what is on there is what they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from autogate.saliency import CountedLayer


class Link(NamedTuple):
    """Where a layer's channels come from and go to.

    Attributes:
        number: of the layer.
        source: the number of the layer that makes all that it reads; None if there are several, or something else.
        direct: whether it is the source of whichever layer reads its channels.
    """

    number: int
    source: int | None
    direct: bool


def links(layers: Sequence[CountedLayer], zero: Tensor) -> list[Link]:
    """The links of layers, in their order.

    Args:
        layers: of a model, in the order they run.
        zero: bool, shape (classes,): the classes that are zero where all the layers that make them are off.
    """
    read_by = [set(layer.inputs.tolist()) for layer in layers]
    made_by = [set(layer.outputs.tolist()) for layer in layers]
    sources: dict[int, int] = {}
    for number, layer in enumerate(layers):
        own = made_by[number]
        if layer.kind != "chosen" or min(own) < 0 or len(own) < len(layer.outputs) or not zero[layer.outputs].all():
            continue
        adds = [one for one in range(len(layers)) if one != number and own & made_by[one]]
        readers = [one for one in range(len(layers)) if layers[one].kind != "whole" and own & read_by[one]]
        if not adds and all(torch.equal(layers[one].inputs, layer.outputs) for one in readers):
            sources.update(dict.fromkeys(readers, number))
    direct = set(sources.values())
    return [Link(number, sources.get(number), number in direct) for number in range(len(layers))]
