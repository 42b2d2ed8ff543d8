"""Which channels a subnet has: plain data, from any way of choosing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from autogate.slim import KeptIndices, check_kept, kept_indices, live_classes
from rewriters import ChannelMap


@dataclass(frozen=True)
class Structure:
    """The channels of one subnet of a model.

    Classes have no names, and another version of autogate may number them differently. So a structure holds the
    indices that stay of every tensor.

    Attributes:
        name: unique among the subnets of a model.
        kept: indices that stay, for all sides that lose any.
        shares: the share of each resource that the subnet has, by the resource's name ("FLOPs", "params").
    """

    name: str
    kept: tuple[KeptIndices, ...] = field(repr=False)
    shares: Mapping[str, float]

    @classmethod
    def of(cls, name: str, channel_map: ChannelMap, live: Tensor, shares: Mapping[str, float]) -> Structure:
        """The structure of the classes in `live` (bool, shape (classes,))."""
        return cls(name, kept_indices(channel_map, live), dict(shares))

    def live(self, channel_map: ChannelMap) -> Tensor:
        """The classes that the subnet has, bool, shape (classes,).

        Raises:
            AutogateError: it is the structure of a model whose channels are coupled in another way.
        """
        live = live_classes(channel_map, self.kept)
        check_kept(kept_indices(channel_map, live), self.kept)
        return live
