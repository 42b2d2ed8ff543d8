"""The partition of a model's channels into classes that live or die together.

A `ChannelMap` is the result of the label pass and all that later steps need. For every side (a dimension of a parameter
or buffer) it has the class of each index; then the kernels, with their cost for a pair of indices, the sides where
gates stand, and the pins. There is one gate a class, FLOPs follow from the live classes on both sides of each kernel,
and slimming removes an index from every tensor that has it.
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
"""The class of a pinned index: it always stays."""

_COMPUTED = "(computed)"


class Side(NamedTuple):
    """One dimension of one parameter or buffer, by its qualified name."""

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}[{self.dim}]"


@dataclass(frozen=True)
class Kernel:
    """The weight of a convolution or linear layer, with its cost.

    `macs` are the multiply-adds that one pair (input channel, output channel) of the weight costs for one sample, over
    all calls of the layer: a layer costs macs * live inputs * live outputs. `mixes` says that channels are summed
    over dimension `input_dim`, so that a gate may stand there. It is false for a depthwise convolution.

    `outputs` are the elements that the layer returns for one sample, over all calls, for each index along the
    dimensions `output_dims`: outputs * live_0 if that is (0,). Only a grouped transposed convolution has its output
    channels along both.

    The output channels lie along the other of the first two dimensions, if `output_dim` names no other one.

    A layer may run once for each channel of other layers, as a mixer's layers across tokens do. Then `repeats` are the
    classes of those channels, and `macs` and `outputs` are for one of them: macs * live_0 * live_1 * (live classes in
    `repeats`).

    A kernel that is computed from several tensors (a mixture of kernels) has no weight of its own (`computed`). Each of
    its sides has one index, which always stays, and it runs once for each output channel that can be removed
    (`repeats`).
    """

    module: str
    weight: str
    macs: float
    input_dim: int
    mixes: bool = True
    outputs: float = 0.0
    output_dims: tuple[int, ...] = (0,)
    repeats: tuple[int, ...] = ()
    output_dim: int | None = None

    @classmethod
    def without_weight(cls, module: str, macs: float, outputs: float) -> Kernel:
        """A computed kernel, with its whole cost and all its outputs."""
        return cls(module, f"{module}.{_COMPUTED}".lstrip("."), macs, input_dim=1, mixes=False, outputs=outputs)

    @property
    def computed(self) -> bool:
        """Whether the kernel is computed in the forward, so that `weight` names no tensor."""
        return self.weight.endswith(_COMPUTED)

    @property
    def input_side(self) -> Side:
        """The side where channels are read."""
        return Side(self.weight, self.input_dim)

    @property
    def output_side(self) -> Side:
        """The side where channels are computed."""
        return Side(self.weight, 1 - self.input_dim if self.output_dim is None else self.output_dim)


@dataclass(frozen=True)
class Pin:
    """Why some channels always stay: the op that needs all of them, and the sides that they lie on."""

    module: str
    op: str
    reason: str
    sides: tuple[Side, ...]

    @property
    def place(self) -> str:
        """The module's path, or words in parentheses for what is no module's: the outputs, the model's own code."""
        return self.module or ("(outputs)" if self.op == "output" else "(model)")


@dataclass(frozen=True)
class Statistic:
    """A mean, variance or norm across channels, which is taken over the live ones while gates train.

    Attributes:
        path: the module that makes the call then (see `rewriters.cross_channel.live_statistics`).
        classes: class of each channel, int64 of shape (channels,); `ALWAYS` if it is pinned.
    """

    path: str
    classes: Tensor


def gather(size: int, ends: Sequence[np.ndarray]) -> tuple[np.ndarray, list[tuple[tuple[int, int], ...]]]:
    """Gather the classes that lie on the same ends, equally often, into kinds.

    Args:
        size: number of classes.
        ends: the class of every index along each end; `ALWAYS` entries don't count.

    Returns:
        The number of each class's kind, int64 of shape (size,), where kinds are numbered in the order of their first
        classes; and for each kind the (end, count) pairs that each of its classes lies on.
    """
    number = np.zeros(size, np.int64)
    places: list[tuple[tuple[int, int], ...]] = [()]
    alike: dict[bytes, list[int]] = {}  # kernel, bias and norm of a layer have the same classes
    text = {id(classes): classes.tobytes() for classes in ends}
    for end, classes in enumerate(ends):
        alike.setdefault(text[id(classes)], []).append(end)
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
    """The distinct classes among these without `ALWAYS`, in order, and how often each occurs."""
    if (classes[1:] > classes[:-1]).all():  # the usual case
        members = classes[1:] if len(classes) and classes[0] == ALWAYS else classes
        return members, np.ones(len(members), np.int64)
    return np.unique(classes[classes != ALWAYS], return_counts=True)


def empty_ends(lengths: Sequence[int], stays: np.ndarray) -> list[int]:
    """Which ends keep no index, where `stays` (bool, one entry an index) has the ends one after another."""
    until = np.cumsum(lengths)
    kept = np.concatenate([[0], np.cumsum(stays)])
    return np.flatnonzero(kept[until] == kept[until - lengths]).tolist()


@dataclass(frozen=True)
class Group:
    """The classes that lie on the same sides: the channels of a layer, or of a whole residual stage.

    `heads` says that each class is a head of attention.
    """

    classes: tuple[int, ...]
    sides: tuple[Side, ...]
    heads: bool = False


@dataclass(frozen=True)
class ChannelMap:
    """Classes of coupled channels and where they lie.

    Attributes:
        size: number of classes, all of which can be removed.
        classes: for each side with at least one class, the class of every index along it (int64, shape (side's size,)),
            or `ALWAYS` if the index is pinned.
        sizes: full length of every side of every kernel, including those without a class.
        kernels: convolutions and linear layers, in the order in which they run.
        gated: input sides over whose channels a kernel sums: a gate stands on each of them.
        pins: why the other channels stay.
        statistics: the statistics that are taken across these classes.
        heads: the classes that are heads: activations are multiplied with one another within each.
    """

    size: int
    classes: Mapping[Side, Tensor]
    sizes: Mapping[Side, int]
    kernels: tuple[Kernel, ...]
    gated: tuple[Side, ...]
    pins: tuple[Pin, ...]
    statistics: tuple[Statistic, ...] = ()
    heads: frozenset[int] = frozenset()

    def kept(self, side: Side, live: Tensor) -> Tensor:
        """The indices along `side` that stay if the classes in `live` (bool, shape (size,)) do."""
        classes = self.classes[side]
        return torch.nonzero(torch.cat([live, live.new_ones(1)])[classes]).flatten()

    def cuts(self, live: Tensor) -> dict[Side, Tensor]:
        """For each side that loses indices if only the classes in `live` stay, those that stay; sides may share one."""
        stays = torch.cat([live, live.new_ones(1)])
        tensors = {id(classes): classes for classes in self.classes.values()}
        kept = {key: torch.nonzero(stays[classes]).flatten() for key, classes in tensors.items()}
        fewer = {key for key, indices in kept.items() if len(indices) < len(tensors[key])}
        return {side: kept[id(classes)] for side, classes in self.classes.items() if id(classes) in fewer}

    def open_columns(self, live: Tensor) -> dict[str, list[tuple[int, Tensor]]]:
        """Which columns of a kernel aren't a dead class's, if only the classes in `live` live.

        Args:
            live: bool, shape (size,).

        Returns:
            By the name of each kernel that sums over a dead class: (dimension, bool of that length).
        """
        found: dict[str, list[tuple[int, Tensor]]] = {}
        stays = torch.cat([live, live.new_ones(1)])
        for side in self.gated:
            is_open = stays[self.classes[side]]
            if not is_open.all():
                found.setdefault(side.tensor, []).append((side.dim, is_open))
        return found

    def width(self, side: Side, live: Tensor) -> int:
        """How many indices along `side` stay."""
        return len(self.kept(side, live)) if side in self.classes else self.sizes.get(side, 1)

    def macs(self, kernel: Kernel, live: Tensor) -> float:
        """Multiply-adds of a kernel for one sample if the classes in `live` stay."""
        each = kernel.macs * self.width(kernel.input_side, live) * self.width(kernel.output_side, live)
        if not kernel.repeats:
            return each
        return each * int(torch.cat([live.cpu(), torch.ones(1, dtype=torch.bool)])[list(kernel.repeats)].sum())

    def reached(self, kernel: Kernel) -> bool:
        """Whether removing classes can make a kernel cheaper: on its own two sides, or among what it repeats for."""
        on_sides = kernel.input_side in self.classes or kernel.output_side in self.classes
        return on_sides or any(label != ALWAYS for label in kernel.repeats)

    def survivors(self, live: Tensor, gone: Set[str] = frozenset()) -> Tensor:
        """Live classes and, for each side that would be empty, its first class.

        A layer that still runs needs a channel. The one that it keeps has a zero kernel behind it, so outputs don't
        change. Tensors in `gone` don't count. Statistics always count, so that their channels don't depend on `gone`:
        which channel is kept follows from the live classes alone, for the gated model and the slim model alike.
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
        """Live classes, and the dead ones that statistics include: the `survivors` on their sides."""
        if not self.statistics:
            return live
        seen = torch.zeros_like(live)
        for statistic in self.statistics:
            seen[statistic.classes[statistic.classes != ALWAYS]] = True
        return live | (self.survivors(live) & seen)

    def where(self, label: int) -> list[tuple[Side, int]]:
        """The (side, index) pairs that are removed with class `label`."""
        return [
            (side, index)
            for side, classes in self.classes.items()
            for index in torch.nonzero(classes == label).flatten().tolist()
        ]

    def describe(self, labels: Iterable[int]) -> str:
        """Where the classes lie, as text: `conv2.weight[1] at 3, 5; fc.weight[1] at 7`."""
        lines: dict[Side, list[int]] = {}
        for label in labels:
            for side, index in self.where(label):
                lines.setdefault(side, []).append(index)
        return "; ".join(f"{side} at {', '.join(map(str, sorted(set(at))))}" for side, at in lines.items())

    def groups(self) -> list[Group]:
        """Classes grouped by the sides that they lie on, in the order of their first classes."""
        sides = list(self.classes)
        tensors = {id(classes): classes for classes in self.classes.values()}  # sides may share one
        members = {key: distinct(classes.cpu().numpy())[0] for key, classes in tensors.items()}
        number, places = gather(self.size, [members[id(self.classes[side])] for side in sides])
        gathered = np.split(np.argsort(number, kind="stable"), np.bincount(number).cumsum())[:-1]
        return [
            Group(
                tuple(members := classes.tolist()),
                tuple(sides[end] for end, _ in where),
                self.heads.issuperset(members),
            )
            for classes, where in zip(gathered, places, strict=True)
        ]

    def why_pinned(self, most: int = 5) -> str:
        """The first few pins (at most `most`) as a sentence: where and why."""
        reasons = dict.fromkeys(f"{pin.module or 'the ' + pin.place.strip('()')}: {pin.reason}" for pin in self.pins)
        return "Kept: " + "; ".join(list(reasons)[:most]) + "." if reasons else "It has no layers to slim."

    def checksum(self) -> int:
        """A checksum of where the classes lie: equal for two maps with the same classes on the same indices."""
        number = 0
        for side, classes in self.classes.items():
            number = zlib.crc32(str(side).encode(), number)
            number = zlib.crc32(classes.cpu().numpy().tobytes(), number)
        return number

    def difference(self, other: ChannelMap, costs: bool = True) -> str | None:
        """The name of the first tensor or module in which two maps differ, or None if they are equal.

        The costs of kernels are compared only with `costs`: how many rows an opaque module returns may depend on
        values.
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
        """The coupling graph: groups and the kernels between them.

        A group's node is ("group", i) and carries `width`, the number of its classes, and `heads`; a kernel's node is
        ("kernel", module) and carries `macs`. An edge's `end` is "input" or "output".
        """
        graph = nx.Graph()
        on_side: dict[Side, list[int]] = {}
        for index, group in enumerate(self.groups()):
            graph.add_node(("group", index), width=len(group.classes), heads=group.heads)
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
