"""Which channels a subnet has: plain data, from any way of choosing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autogate.slim import KeptIndices, check_kept, kept_indices, live_classes
from rewriters import ALWAYS, AutogateError, ChannelMap, Side


@dataclass(frozen=True)
class Deaths:
    """In which order the dead channels of one group died.

    Attributes:
        side: a side that the group lies on: (name of the parameter or buffer, dimension).
        indices: an index of each dead class there, of the first that died first.
    """

    side: tuple[str, int]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """The channels of one subnet of a model.

    Classes have no names, and another version of autogate may number them differently. So a structure holds the
    indices that stay of every tensor.

    Attributes:
        name: unique among the subnets of a model.
        kept: indices that stay, for all sides that lose any.
        shares: the share of each resource that the subnet has, by the resource's name ("FLOPs", "params").
        deaths: the order in which channels died, for each group that lost any; empty if it isn't known.
    """

    name: str
    kept: tuple[KeptIndices, ...] = field(repr=False)
    shares: Mapping[str, float]
    deaths: tuple[Deaths, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls, name: str, channel_map: ChannelMap, live: Tensor, shares: Mapping[str, float], dead: Tensor | None = None
    ) -> Structure:
        """The structure of the classes in `live` (bool, shape (classes,)).

        Args:
            name: of the structure.
            channel_map: the model's channels.
            live: the classes that it has.
            shares: the share of each resource, by name.
            dead: when each class died, shape (classes,): larger is later.
        """
        deaths = () if dead is None else _deaths(channel_map, live, dead)
        return cls(name, kept_indices(channel_map, live), dict(shares), deaths)

    def live(self, channel_map: ChannelMap) -> Tensor:
        """The classes that the subnet has, bool, shape (classes,).

        Raises:
            AutogateError: it is the structure of a model whose channels are coupled in another way.
        """
        live = live_classes(channel_map, self.kept)
        check_kept(kept_indices(channel_map, live), self.kept)
        return live

    def died(self, channel_map: ChannelMap) -> Tensor:
        """When each class died among those of its group, int64, shape (classes,): larger is later, 0 is unknown.

        Raises:
            AutogateError: it is the structure of another model.
        """
        died = torch.zeros(channel_map.size, dtype=torch.int64)
        for one in self.deaths:
            side = Side(*one.side)
            classes = channel_map.classes.get(side)
            if classes is None or not all(0 <= index < len(classes) for index in one.indices):
                raise AutogateError("its channels are not those that the structure speaks of.", where=str(side))
            labels = classes[list(one.indices)]
            died[labels[labels != ALWAYS]] = torch.arange(1, len(labels) + 1)[labels != ALWAYS]
        return died


def _deaths(channel_map: ChannelMap, live: Tensor, dead: Tensor) -> tuple[Deaths, ...]:
    found = []
    for group in channel_map.groups():
        lost = [label for label in group.classes if not live[label]]
        lost.sort(key=lambda label: float(dead[label]))
        if lost:
            classes = channel_map.classes[group.sides[0]].tolist()
            first = {label: index for index, label in reversed(list(enumerate(classes)))}
            side = group.sides[0]
            found.append(Deaths((side.tensor, side.dim), tuple(first[label] for label in lost)))
    return tuple(found)
