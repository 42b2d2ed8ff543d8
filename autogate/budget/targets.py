"""Targets: resources with the share of each that is to be left, combined into one distance.

The distance from the targets is 1 at the start and 0 when the last target is met. In between, it is the largest part of
the way that any resource still has to go. With one resource, it is that resource's share on another scale; with
several, the one furthest behind counts. Prices are averaged, weighted by the way that each resource still has to go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real

import torch
from torch import Tensor, nn

from autogate.budget.latency import Latency
from autogate.budget.products import Activations, Flops, Params
from autogate.budget.resource import Resource
from autogate.inputs import Inputs
from rewriters import AutogateError, ChannelMap

ResourceMaker = Callable[[ChannelMap, nn.Module], Resource]
"""A resource's class, or any callable that makes a resource from a channel map and its model."""


ROUNDING = 1e-9
"""Shares that differ by less are equal: sums in float64 may be off in their last digits."""


@dataclass(frozen=True)
class Shares:
    """The budget that the caller asks for: shares in (0, 1], None for a resource without one.

    If all are None, half of the FLOPs are to be left.

    Attributes:
        flops, params, activations, latency: see `autogate.prepare`.
        resources: shares of the caller's own resources.

    Raises:
        AutogateError: a share is outside of its range.
    """

    flops: float | None = None
    params: float | None = None
    activations: float | None = None
    latency: float | None = None
    resources: Mapping[ResourceMaker, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, share in (*self._named(), *((str(maker), share) for maker, share in self.resources.items())):
            if isinstance(share, bool) or not isinstance(share, Real):
                raise AutogateError(
                    f"{name} is {share!r}, of type {type(share).__name__}; a share must be a number in (0, 1].",
                    where="budget",
                )
            if not 0 < share <= 1:
                raise AutogateError(f"{name} is {share!r}; a share must be in (0, 1].", where="budget")

    @classmethod
    def given(
        cls, flops: float | None, params: float | None, activations: float | None, latency: float | None,
        resources: Mapping[ResourceMaker, float],
    ) -> Shares | None:  # fmt: skip
        """The shares that were asked for; None if there are none."""
        asked = (flops, params, activations, latency)
        return cls(*asked, resources) if resources or any(share is not None for share in asked) else None

    def _named(self) -> list[tuple[str, float]]:
        asked = (("flops", self.flops), ("params", self.params), ("activations", self.activations),
                 ("latency", self.latency))  # fmt: skip
        named = [(name, share) for name, share in asked if share is not None]
        return named if named or self.resources else [("flops", 0.5)]

    def targets(
        self, model: nn.Module, channel_map: ChannelMap, inputs: Inputs, added: Collection[str] = (),
        known: Iterable[Resource] = (),
    ) -> Targets:  # fmt: skip
        """Build the resources that have a share, for a model.

        Args:
            model: the model to slim.
            channel_map: its classes of channels.
            inputs: inputs to measure the latency on.
            added: weights of layers that were not in the user's model; shares are relative to the model without them.
            known: resources of this map that were built before: a latency among them is not measured again.
        """
        measured = [resource for resource in known if isinstance(resource, Latency)]
        makers: dict[str, Callable[[], Resource]] = {
            "flops": lambda: Flops(channel_map, model, added),
            "params": lambda: Params(channel_map, model, added),
            "activations": lambda: Activations(channel_map, model, added),
            "latency": lambda: measured[0] if measured else Latency.measure(channel_map, model, inputs, added),
        }
        own = [Target(maker(channel_map, model), share) for maker, share in self.resources.items()]
        return Targets([*(Target(makers[name](), share) for name, share in self._named()), *own])


@dataclass(frozen=True)
class Target:
    """A resource, and the share of it that is to be left, in (0, 1]."""

    resource: Resource
    share: float

    @cached_property
    def way(self) -> float:
        """The part of the resource that has to be removed: the unit of distances."""
        return self.resource.start - self.share

    def distance(self, live: Tensor) -> float:
        """The part of the way that is still to go; negative beyond the target."""
        gap = self.resource.share(live) - self.share
        return 0.0 if abs(gap) < ROUNDING else gap / self.way


class Targets:
    """The targets of a run.

    A resource that meets its target with every class alive stays met, because dead classes don't come back. It is
    reported, and otherwise ignored.

    Args:
        targets: at least one, each for another resource.

    Raises:
        AutogateError: two targets are for the same resource.
    """

    def __init__(self, targets: Sequence[Target]):
        names = [target.resource.name for target in targets]
        for name in names:
            if names.count(name) > 1:
                raise AutogateError(
                    f"the {name} have several targets.", where="budget", remedy="Give only the smallest one."
                )
        self.targets = tuple(targets)
        self._open = tuple(target for target in self.targets if target.way > 0)

    @property
    def size(self) -> int:
        """Number of classes."""
        return self.targets[0].resource.size

    def shares(self, live: Tensor) -> dict[str, float]:
        """The share of each resource that `live` (bool, shape (classes,), on the CPU) leaves, by its name."""
        return {target.resource.name: target.resource.share(live) for target in self.targets}

    def wanted(self) -> dict[str, float]:
        """The target share of each resource, by the resource's name."""
        return {target.resource.name: target.share for target in self.targets}

    def distance(self, live: Tensor) -> float:
        """The part of the way still to go: 1 with every class alive, 0 or less if all targets are met."""
        return max((target.distance(live) for target in self._open), default=0.0)

    def distance_without_each(self, live: Tensor) -> Tensor:
        """For each class, the distance if that class dies too: float64, shape (classes,)."""
        each = torch.full((self.size,), -torch.inf, dtype=torch.float64)
        for target in self._open:
            drop = target.resource.drop(live) / target.resource.whole / target.way
            each = torch.maximum(each, target.distance(live) - drop)
        return each

    def price(self, live: Tensor) -> Tensor:
        """The price of each class, relative to the mean price of live classes: float64, shape (classes,).

        The prices of several resources are averaged, weighted by the way that each still has to go.
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
        """The distance that corresponds to a difference of `share` in the resource with the longest way."""
        return share / max((target.way for target in self._open), default=1.0)

    def out_of_reach(self) -> tuple[Target, ...]:
        """Targets that are missed even if every class that can die is dead."""
        return tuple(target for target in self.targets if target.resource.least > target.share)
