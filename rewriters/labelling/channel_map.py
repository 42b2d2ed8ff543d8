"""The partition of a model's channels into classes that live or die together.

A `ChannelMap` is what the label pass leaves behind and all that the later steps need: gates take one
entry a class, the FLOPs model counts live classes on both sides of each kernel, slimming takes an index
out of every tensor that carries it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

import networkx as nx
import numpy as np
import torch
from torch import Tensor

ALWAYS = -1
"""Class of an index that always stays."""

_COMPUTED = "(computed)"


class Side(NamedTuple):
    """One dimension of one parameter or buffer, by its qualified name."""

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}[{self.dim}]"


@dataclass(frozen=True)
class Kernel:
    """The weight of a convolution or linear layer, as the cost of running it sees it.

    `macs` are the multiply-adds that one pair (index of dimension 0, index of dimension 1) of the weight
    costs for one sample, over all calls of the layer: a layer costs macs * live_0 * live_1. `mixes` says
    that channels are summed over dimension `input_dim`, so that a gate may stand there; it is false for a
    depthwise convolution.

    `outputs` are the elements that the layer gives for one sample, over all calls, for each index along the
    dimensions `output_dims`: outputs * live_0 where that is (0,). Only a grouped transposed convolution
    has its output channels along both.

    A layer may run once for each channel of others: a mixer's layers across tokens do. `repeats` are the
    classes of those channels then, and `macs` and `outputs` are for one of them: macs * live_0 * live_1 *
    live in `repeats`.

    A kernel that is computed from several tensors, as a mixture of others is, has no weight of its own (`computed`).
    Its sides are of one index that always stays, and it runs once for each output channel that may go (`repeats`).
    """

    module: str
    weight: str
    macs: float
    input_dim: int
    mixes: bool = True
    outputs: float = 0.0
    output_dims: tuple[int, ...] = (0,)
    repeats: tuple[int, ...] = ()

    @classmethod
    def without_weight(cls, module: str, macs: float, outputs: float) -> Kernel:
        """A computed kernel, with all that it costs and gives."""
        return cls(module, f"{module}.{_COMPUTED}".lstrip("."), macs, input_dim=1, mixes=False, outputs=outputs)

    @property
    def computed(self) -> bool:
        """Whether `weight` names no tensor."""
        return self.weight.endswith(_COMPUTED)

    @property
    def input_side(self) -> Side:
        """Where channels are read."""
        return Side(self.weight, self.input_dim)

    @property
    def output_side(self) -> Side:
        """Where channels are made."""
        return Side(self.weight, 1 - self.input_dim)


@dataclass(frozen=True)
class Pin:
    """Why some channels always stay: the op that needs them whole, and the sides they lie on."""

    module: str
    op: str
    reason: str
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Statistic:
    """A mean, variance or norm along channels, taken over the live ones of them while gates train.

    Attributes:
        path: of the module that stands in for the call then (see `rewriters.cross_channel.live_statistics`).
        classes: class of each channel, int64 of shape (channels,); `ALWAYS` where it is pinned.
    """

    path: str
    classes: Tensor


def gather(size: int, ends: Sequence[np.ndarray]) -> tuple[np.ndarray, list[tuple[tuple[int, int], ...]]]:
    """Gather the classes that lie on the same ends, equally often.

    Args:
        size: number of classes.
        ends: the class of every index along each end; `ALWAYS` entries don't count.

    Returns:
        For each class the number of its kind, int64 of shape (size,), kinds being numbered in the order of their
        first classes; and for each kind the (end, count) pairs that one of its classes lies on.
    """
    number = np.zeros(size, np.int64)
    places: list[tuple[tuple[int, int], ...]] = [()]
    alike: dict[bytes, list[int]] = {}  # kernel, bias and norm of a layer have the same classes
    for end, classes in enumerate(ends):
        alike.setdefault(classes.tobytes(), []).append(end)
    for same in alike.values():
        members, counts = distinct(ends[same[0]])
        base = counts.max(initial=0) + 1
        kinds, place = np.unique(number[members] * base + counts, return_inverse=True)
        number[members] = len(places) + place
        before, count = (part.tolist() for part in np.divmod(kinds, base))
        for kind, times in zip(before, count, strict=True):
            places.append((*places[kind], *((end, times) for end in same)))
    kinds, first, place = np.unique(number, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return np.argsort(order)[place], [tuple(sorted(places[kinds[at]])) for at in order]


def distinct(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes among these, `ALWAYS` left out, in order, and how often each is there."""
    if (classes[1:] > classes[:-1]).all():  # as they mostly are
        members = classes[1:] if len(classes) and classes[0] == ALWAYS else classes
        return members, np.ones(len(members), np.int64)
    return np.unique(classes[classes != ALWAYS], return_counts=True)


def empty_ends(lengths: Sequence[int], stays: np.ndarray) -> list[int]:
    """Which of the ends that lie one after another in `stays` (bool, one entry an index) keep no index."""
    until = np.cumsum(lengths)
    kept = np.concatenate([[0], np.cumsum(stays)])
    return np.flatnonzero(kept[until] == kept[until - lengths]).tolist()


@dataclass(frozen=True)
class Group:
    """Classes that lie on the same sides: the channels of a layer, or of a whole residual stage."""

    classes: tuple[int, ...]
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class ChannelMap:
    """Classes of coupled channels and where they lie.

    Attributes:
        size: number of classes that may die.
        classes: for each side that holds at least one such class, the class of every index along it
            (int64, shape (side's size,)), or `ALWAYS` where the index is pinned.
        sizes: full length of every side of every kernel, also of those that hold no class.
        kernels: convolutions and linear layers, in the order they run.
        gated: input sides where classes are merged into sums: a gate stands on each of them.
        pins: why the other channels stay.
        statistics: what looks at channels that may die.
    """

    size: int
    classes: Mapping[Side, Tensor]
    sizes: Mapping[Side, int]
    kernels: tuple[Kernel, ...]
    gated: tuple[Side, ...]
    pins: tuple[Pin, ...]
    statistics: tuple[Statistic, ...] = ()

    def kept(self, side: Side, live: Tensor) -> Tensor:
        """Indices along `side` that stay when the classes in `live` (bool, shape (size,)) do."""
        classes = self.classes[side]
        return torch.nonzero(torch.cat([live, live.new_ones(1)])[classes]).flatten()

    def width(self, side: Side, live: Tensor) -> int:
        """How many indices along `side` stay."""
        return len(self.kept(side, live)) if side in self.classes else self.sizes.get(side, 1)

    def macs(self, kernel: Kernel, live: Tensor) -> float:
        """Multiply-adds of a kernel for one sample when the classes in `live` stay."""
        each = kernel.macs * self.width(kernel.input_side, live) * self.width(kernel.output_side, live)
        if not kernel.repeats:
            return each
        return each * int(torch.cat([live.cpu(), torch.ones(1, dtype=torch.bool)])[list(kernel.repeats)].sum())

    def reached(self, kernel: Kernel) -> bool:
        """Whether classes that may go make it cheaper: some of its own two sides, or of what it runs for."""
        on_sides = kernel.input_side in self.classes or kernel.output_side in self.classes
        return on_sides or any(label != ALWAYS for label in kernel.repeats)

    def survivors(self, live: Tensor, gone: Set[str] = frozenset()) -> Tensor:
        """Live classes and, on each side that would be left with nothing, its first class.

        A layer that still runs needs a channel; the one kept has a zero kernel behind it, so that outputs
        don't change. Tensors in `gone` are left out of account; statistics never are, so that what they look
        at doesn't hang on it.
        """
        ends = [classes for side, classes in self.classes.items() if side.tensor not in gone]
        ends += [statistic.classes for statistic in self.statistics]
        kept = live.clone()
        if ends:
            stays = torch.cat([live, live.new_ones(1)])[torch.cat(ends)]
            for end in empty_ends([len(classes) for classes in ends], stays.cpu().numpy()):
                kept[ends[end][0]] = True
        return kept

    def looked_at(self, live: Tensor) -> Tensor:
        """Live classes and those that statistics look at though they are dead: `survivors` of their sides."""
        if not self.statistics:
            return live
        seen = torch.zeros_like(live)
        for statistic in self.statistics:
            seen[statistic.classes[statistic.classes != ALWAYS]] = True
        return live | (self.survivors(live) & seen)

    def where(self, label: int) -> list[tuple[Side, int]]:
        """The (side, index) pairs that class `label` takes out when it dies."""
        return [
            (side, index)
            for side, classes in self.classes.items()
            for index in torch.nonzero(classes == label).flatten().tolist()
        ]

    def describe(self, labels: Iterable[int]) -> str:
        """Where the classes lie, for a reader: `conv2.weight[1] at 3, 5; fc.weight[1] at 7`."""
        lines: dict[Side, list[int]] = {}
        for label in labels:
            for side, index in self.where(label):
                lines.setdefault(side, []).append(index)
        return "; ".join(f"{side} at {', '.join(map(str, sorted(set(at))))}" for side, at in lines.items())

    def groups(self) -> list[Group]:
        """Classes gathered by the sides they lie on, in order of their first class."""
        sides = list(self.classes)
        number, places = gather(self.size, [distinct(self.classes[side].cpu().numpy())[0] for side in sides])
        gathered = np.split(np.argsort(number, kind="stable"), np.bincount(number).cumsum())[:-1]
        return [
            Group(tuple(classes.tolist()), tuple(sides[end] for end, _ in where))
            for classes, where in zip(gathered, places, strict=True)
        ]

    def why_pinned(self, most: int = 5) -> str:
        """The ops that keep channels whole and why, in a sentence; at most the first few."""
        reasons = dict.fromkeys(f"{pin.module or 'the outputs'}: {pin.reason}" for pin in self.pins)
        return "Kept: " + "; ".join(list(reasons)[:most]) + "." if reasons else "It has no layers to cut."

    def checksum(self) -> int:
        """A number that two maps share if their classes lie on the same indices of the same sides."""
        number = 0
        for side, classes in self.classes.items():
            number = zlib.crc32(str(side).encode(), number)
            number = zlib.crc32(classes.cpu().numpy().tobytes(), number)
        return number

    def difference(self, other: ChannelMap, costs: bool = True) -> str | None:
        """Where two maps differ first, by a tensor's or module's name, or None where they are the same.

        What kernels cost is not compared if not `costs`: an opaque module may give as many rows as values ask for.
        """
        for mine, theirs in zip(self.kernels, other.kernels, strict=False):
            if mine != (theirs if costs else replace(theirs, macs=mine.macs, outputs=mine.outputs)):
                return mine.module
        if len(self.kernels) != len(other.kernels):
            return max(self.kernels, other.kernels, key=len)[min(len(self.kernels), len(other.kernels))].module
        for side in {**self.classes, **other.classes}:
            here, there = self.classes.get(side), other.classes.get(side)
            if here is None or there is None or not torch.equal(here.cpu(), there.cpu()):
                return str(side)
        return None

    def graph(self) -> nx.Graph:
        """The coupling graph: groups and the kernels between them, ready to be drawn.

        A group's node is ("group", i) and carries `width`, the number of its classes; a kernel's node is
        ("kernel", module) and carries `macs`. An edge's `end` is "input" or "output".
        """
        graph = nx.Graph()
        on_side: dict[Side, list[int]] = {}
        for index, group in enumerate(self.groups()):
            graph.add_node(("group", index), width=len(group.classes))
            for side in group.sides:
                on_side.setdefault(side, []).append(index)
        for kernel in self.kernels:
            node = ("kernel", kernel.module)
            graph.add_node(node, macs=kernel.macs)
            for end, side in (("input", kernel.input_side), ("output", kernel.output_side)):
                for index in on_side.get(side, ()):
                    graph.add_edge(("group", index), node, end=end)
        return graph

    def to(self, device: torch.device | str) -> ChannelMap:
        """The same map with its index tensors on `device`."""
        classes = {side: labels.to(device) for side, labels in self.classes.items()}
        return replace(self, classes=classes)
