"""What a run shall come to: resources with the share of each that shall be left, taken together as one.

Where a model stands is told by one number, its distance from the targets: 1 where the gates start, 0 where the
last of the targets is met, in between the largest part of the way that any resource has still to go. With one
resource that is its share on another scale; with several the one furthest behind counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from autogate.budget.latency import Latency
from autogate.budget.products import Activations, Flops, Params
from autogate.budget.resource import Resource
from autogate.inputs import Inputs
from rewriters import AutogateError, ChannelMap

ResourceMaker = Callable[[ChannelMap, nn.Module], Resource]
"""A resource's class, or anything else that makes one from a channel map and the model it is of."""


ROUNDING = 1e-9
"""A share that differs from another by less is that share: sums of float64 may be off in their last places."""


@dataclass(frozen=True)
class Shares:
    """What the caller asks for: shares in (0, 1], None where a resource is free; half the FLOPs if all are.

    Attributes:
        flops, params, activations, latency: see `autogate.prepare`.
        resources: shares of resources of the caller's own.

    Raises:
        AutogateError: for a share outside its range.
    """

    flops: float | None = None
    params: float | None = None
    activations: float | None = None
    latency: float | None = None
    resources: Mapping[ResourceMaker, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, share in (*self._named(), *((str(maker), share) for maker, share in self.resources.items())):
            if not 0 < share <= 1:
                raise AutogateError(f"{name} is {share!r}; a share must be in (0, 1].", where="budget")

    def _named(self) -> list[tuple[str, float]]:
        asked = (("flops", self.flops), ("params", self.params), ("activations", self.activations),
                 ("latency", self.latency))  # fmt: skip
        named = [(name, share) for name, share in asked if share is not None]
        return named if named or self.resources else [("flops", 0.5)]

    def targets(
        self, model: nn.Module, channel_map: ChannelMap, inputs: Inputs, added: Collection[str] = ()
    ) -> Targets:
        """The resources that are asked a share of, built for a model.

        Args:
            model: the model that shall be slimmed.
            channel_map: its classes of channels.
            inputs: what it is run on where its latency is measured.
            added: weights of layers that were not in the user's model; shares are of the model without them.
        """
        makers: dict[str, Callable[[], Resource]] = {
            "flops": lambda: Flops(channel_map, model, added),
            "params": lambda: Params(channel_map, model, added),
            "activations": lambda: Activations(channel_map, model, added),
            "latency": lambda: Latency.measure(channel_map, model, inputs, added),
        }
        own = [Target(maker(channel_map, model), share) for maker, share in self.resources.items()]
        return Targets([*(Target(makers[name](), share) for name, share in self._named()), *own])


@dataclass(frozen=True)
class Target:
    """A resource, and the share of it that shall be left, in (0, 1]."""

    resource: Resource
    share: float

    @cached_property
    def way(self) -> float:
        """The part of the resource that has to go: what distances are measured in."""
        return self.resource.start - self.share

    def distance(self, live: Tensor) -> float:
        """The part of the way that is still to go, negative beyond the target."""
        gap = self.resource.share(live) - self.share
        return 0.0 if abs(gap) < ROUNDING else gap / self.way


class Targets:
    """The targets of a run.

    A resource that meets its target with every class alive stays met, since nothing comes back to life: it is
    reported and asks for nothing.

    Args:
        targets: at least one, each of another resource.

    Raises:
        AutogateError: two targets speak of the same resource.
    """

    def __init__(self, targets: Sequence[Target]):
        names = [target.resource.name for target in targets]
        for name in names:
            if names.count(name) > 1:
                raise AutogateError(
                    f"the {name} have several targets.", where="budget", remedy="Ask for the smallest of them only."
                )
        self.targets = tuple(targets)
        self._open = tuple(target for target in self.targets if target.way > 0)

    @property
    def size(self) -> int:
        """Number of classes."""
        return self.targets[0].resource.size

    def shares(self, live: Tensor) -> dict[str, float]:
        """The part of each resource that `live` (bool, shape (classes,), on the CPU) leaves, by its name."""
        return {target.resource.name: target.resource.share(live) for target in self.targets}

    def wanted(self) -> dict[str, float]:
        """The part of each resource that shall be left, by its name."""
        return {target.resource.name: target.share for target in self.targets}

    def distance(self, live: Tensor) -> float:
        """The part of the way still to go: 1 with every class alive, 0 or less where all targets are met."""
        return max((target.distance(live) for target in self._open), default=0.0)

    def distance_without_each(self, live: Tensor) -> Tensor:
        """The distance after the death of one class, for each of them: float64, shape (classes,)."""
        each = torch.full((self.size,), -torch.inf, dtype=torch.float64)
        for target in self._open:
            drop = target.resource.drop(live) / target.resource.whole / target.way
            each = torch.maximum(each, target.distance(live) - drop)
        return each

    def price(self, live: Tensor) -> Tensor:
        """What each class costs, relative to the mean of live classes: float64, shape (classes,).

        Of several resources the prices are averaged, each with the weight of the way it has still to go.
        """
        weights = [max(target.distance(live), 0.0) for target in self._open]
        total = sum(weights)
        price = torch.zeros(self.size, dtype=torch.float64)
        for target, weight in zip(self._open, weights, strict=True):
            if weight > 0:
                own = target.resource.price(live)
                mean = own[live].mean() if live.any() else own.new_ones(())
                price += weight / total * own / mean.clamp(min=1e-12)
        return price

    def tolerance(self, share: float) -> float:
        """The distance that a difference of `share` in the resource with the longest way makes."""
        return share / max((target.way for target in self._open), default=1.0)

    def out_of_reach(self) -> tuple[Target, ...]:
        """Targets that are missed even when every class that may die is dead."""
        return tuple(target for target in self.targets if target.resource.least > target.share)
