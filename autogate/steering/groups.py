"""Groups: classes that lie on the same sides, the width of a layer or of all layers that share it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from autogate.steering.schedule import whole_number
from rewriters import ALWAYS, ChannelMap


@dataclass(frozen=True)
class Group:
    """Classes that lie on the same sides, and how many of them may die.

    Attributes:
        classes: their indices.
        pace: so many of them die together, so that the widths of all layers stay multiples of `round_to`.
        needed: every path from inputs to outputs leads through it (see `critical_groups`): it doesn't die as a whole.
        least, most: how many of them the caller's limits let stay, in whole bundles; a group without limits has
            0 and None.
    """

    classes: tuple[int, ...]
    pace: int = 1
    needed: bool = False
    least: int = 0
    most: int | None = None

    @property
    def narrowest(self) -> int:
        """The fewest classes that it has if it doesn't die as a whole: a bundle, or all of them if they are fewer."""
        return max(self.least, min(self.pace, len(self.classes)))

    @property
    def widest(self) -> int:
        """The most classes that may stay of it in the end."""
        return len(self.classes) if self.most is None else self.most


def groups_of(channel_map: ChannelMap, round_to: int) -> list[Group]:
    """The groups of a map, each with the pace that keeps widths multiples of `round_to`.

    If a class holds several channels of a layer (those of an attention head), fewer classes make a multiple.

    Raises:
        AutogateError: `round_to` is not a whole number from 1 up.
    """
    round_to = whole_number("round_to", round_to)
    if round_to == 1:
        return [Group(group.classes) for group in channel_map.groups()]
    counts = {
        side: torch.bincount(classes[classes != ALWAYS].cpu(), minlength=channel_map.size)
        for side, classes in channel_map.classes.items()
    }
    groups = []
    for group in channel_map.groups():
        held = {count for side in group.sides for count in counts[side][list(group.classes)].unique().tolist()}
        groups.append(Group(group.classes, math.lcm(*(round_to // math.gcd(round_to, count) for count in held))))
    return groups


def places(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """The number of each class's group, and its place in that group; int64, shape (classes,) each."""
    classes = torch.from_numpy(np.fromiter(chain.from_iterable(group.classes for group in groups), np.int64))
    sizes = torch.tensor([len(group.classes) for group in groups], dtype=torch.int64)
    group = torch.arange(len(groups)).repeat_interleave(sizes)
    place = torch.arange(len(classes)) - (torch.cumsum(sizes, 0) - sizes)[group]
    return torch.empty_like(group).scatter_(0, classes, group), torch.empty_like(place).scatter_(0, classes, place)


class Narrowing:
    """Groups narrowed uniformly, each to its first classes, within its limits."""

    def __init__(self, groups: Sequence[Group]):
        self._sizes = torch.tensor([len(group.classes) for group in groups], dtype=torch.int64)
        self._paces = torch.tensor([group.pace for group in groups], dtype=torch.int64)
        self._narrowest = torch.tensor([group.narrowest for group in groups], dtype=torch.int64)
        self._widest = torch.tensor([group.widest for group in groups], dtype=torch.int64)
        self._group, self._place = places(groups)

    def counts(self, part: float) -> Tensor:
        """How many classes `part` of each group is: at least one, in whole bundles; int64, shape (groups,)."""
        bundles = torch.ceil(part * self._sizes / self._paces).to(torch.int64).clamp(min=1)
        return torch.minimum(torch.maximum(bundles * self._paces, self._narrowest), self._widest)

    def live(self, part: float) -> Tensor:
        """The first classes of each group, `part` of it, live; bool, shape (classes,)."""
        return self.of_counts(self.counts(part))

    def of_counts(self, counts: Tensor) -> Tensor:
        """The first `counts` (int64, shape (groups,)) classes of each group live; bool, shape (classes,)."""
        return self._place < counts[self._group]
