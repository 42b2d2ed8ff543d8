"""A step of the gates: the controller sets the pressure, the method proposes, the selection decides who dies.

Values in, values out. The kernels are not known here, so whole runs can be tested without a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from autogate.budget import Targets
from autogate.methods.method import Gates, Grouping, Method, Proposal, Step
from autogate.steering import (
    Deaths,
    Group,
    Limit,
    Pressure,
    Schedule,
    Selection,
    groups_of,
    limited,
    steer,
    with_needed,
)
from rewriters import AutogateError, ChannelMap


class Standing(NamedTuple):
    """Where a model is on its way: the distance from its targets, and the relative price of each class."""

    distance: float
    price: Tensor


class Learner:
    """Moves gates towards the targets.

    Args:
        method: how gates move.
        targets: what is to be left; all of them are met.
        groups: classes that lie on the same sides.
        steps: optimizer steps of the run; the method's own length, or the schedule's default, if None.

    Attributes:
        method, targets, groups: as given.
        schedule: the course of the run.
        selection: decides which candidates die.
    """

    def __init__(self, method: Method, targets: Targets, groups: Sequence[Group], steps: int | None = None):
        self.method = method
        self.targets = targets
        self.groups = tuple(groups)
        steps = method.run_steps if steps is None else steps
        self.schedule = Schedule(course=method) if steps is None else Schedule(steps, method)
        self.selection = Selection(targets, self.schedule, groups)
        self._groups_on: tuple[torch.device, Grouping] | None = None

    @classmethod
    def of(
        cls, channel_map: ChannelMap, targets: Targets, method: Method, *, steps: int | None = None, round_to: int = 1,
        limits: Sequence[Limit] = (),
    ) -> Learner:  # fmt: skip
        """The learner for a model.

        Args:
            channel_map: the model's classes of channels.
            targets, method, steps: as above.
            round_to: a layer that loses channels keeps a multiple of this number.
            limits: bounds on the share of channels that layers keep.

        Raises:
            AutogateError: a target is out of reach, even with the fewest classes that connect inputs to outputs; or
                limits contradict each other, a pin or a target.
        """
        groups = limited(groups_of(channel_map, round_to), channel_map, limits)
        return cls(method, targets, _within_reach(groups, channel_map, targets, method), steps)

    def towards(self, targets: Targets, channel_map: ChannelMap) -> Learner:
        """A learner like this one for other targets of the same map.

        Raises:
            AutogateError: a target is out of reach.
        """
        groups = _within_reach(self.groups, channel_map, targets, self.method)
        return Learner(self.method, targets, groups, self.schedule.steps)

    def start(self) -> Gates:
        """The gates before the first step: all of them open."""
        size = self.targets.size
        return Gates(torch.ones(size), torch.ones(size, dtype=torch.bool), self.method.start(size))

    def standing(self, live: Tensor) -> Standing:
        """Where a model with these live classes (bool, shape (classes,)) is."""
        on_host = live.cpu()
        if self.method.lam is not None:
            return Standing(1.0, self._fixed_price(live))
        return Standing(self.selection.distance(on_host), self.selection.price(on_host).to(live.device, torch.float32))

    def _fixed_price(self, live: Tensor) -> Tensor:
        """The price of each class if lambda is fixed, relative to the mean price in the dense model."""
        resource, alive = self.targets.targets[0].resource, live.cpu()
        price = resource.price(alive) / resource.price(torch.ones_like(alive)).mean().clamp(min=1e-12)
        return price.to(live.device, torch.float32)

    def step(self, gates: Gates, reading: Tensor, lr: float, standing: Standing | None = None) -> Gates:
        """The gates after one step.

        Args:
            gates: the gates before it.
            reading: what the method has read, shape (classes,).
            lr: the kernels' learning rate.
            standing: of the live classes, if it is known.
        """
        distance, price = self.standing(gates.live) if standing is None else standing
        number = gates.count + 1
        pressure = self._pressure(gates, distance, number)
        peak = max(gates.peak, lr)
        groups = self._grouping(gates.alpha.device)
        prices = None if self.method.lam is None else self._fixed_price
        step = Step(number, self.schedule, lr, peak, price, pressure.movement, groups, prices)
        proposal = self.method.propose(gates, reading, step)
        deaths = self._deaths(proposal, gates.live, number)
        pressed = pressure.movement > 0
        if pressed:
            pressure = replace(pressure, settled=pressure.settled or deaths.settled)
        alpha = self.method.hold_open(proposal.alpha, pressed and not deaths.settled)
        alpha = torch.where(gates.live, alpha, 0.0).index_fill_(0, deaths.classes.to(alpha.device), 0.0)
        return Gates(alpha, alpha != 0, proposal.state, number, pressure, peak, proposal.balance)

    def _pressure(self, gates: Gates, distance: float, number: int) -> Pressure:
        """The controller's output; with a fixed lambda there is pressure up to the last step."""
        if self.method.lam is None:
            return steer(self.schedule, gates.pressure, distance, number)
        over = number >= self.schedule.steps
        return Pressure(movement=0.0 if over else 1.0, settled=over)

    def _grouping(self, device: torch.device) -> Grouping:
        if self._groups_on is None or self._groups_on[0] != device:
            self._groups_on = (device, Grouping([group.classes for group in self.groups], device))
        return self._groups_on[1]

    def _deaths(self, proposal: Proposal, live: Tensor, number: int) -> Deaths:
        candidates = proposal.candidates
        if candidates is None or not candidates.any():
            return Deaths(torch.zeros(0, dtype=torch.int64))
        if self.method.lam is not None:
            return self.selection.choose(proposal.importance.cpu(), candidates.cpu(), live.cpu(), -math.inf)
        return self.selection.deaths(proposal.importance.cpu(), candidates.cpu(), live.cpu(), number)

    def is_over(self, count: int, settled: bool) -> bool:
        """Whether gates no longer move after `count` steps.

        The run is over, or the targets are met (`settled`) and the method is at rest.
        """
        return count >= self.schedule.steps or (settled and self.method.is_at_rest(count, self.schedule))


def _within_reach(
    groups: Sequence[Group], channel_map: ChannelMap, targets: Targets, method: Method
) -> list[Group]:  # fmt: skip
    """The groups, with those marked that the targets need alive; raises if a target is out of reach."""
    for target in targets.out_of_reach():
        raise AutogateError(
            f"{target.share:.3f} of the {target.resource.name} can't be reached: {target.resource.least:.3f} are "
            f"left when every channel that can be removed is removed. {channel_map.why_pinned()}",
            remedy="Ask for a larger share.",
        )
    if method.lam is not None and any(group.most is not None for group in groups):
        raise AutogateError(
            "limits: a fixed lambda can't be held to the most that may stay.",
            where=repr(method),
            remedy="Give the least shares alone, or steer lambda to a budget.",
        )
    return with_needed(groups, channel_map, targets, always=method.lam is not None)
