"""How a budget becomes a price: the controller that steers lambda, and the choice of the classes that die.

The paper sets lambda by hand and names that as its disadvantage (Guo et al., "GDP", section 5). Here the
user names the share of FLOPs that shall be left, and lambda follows from how far the model is from it.

What is steered is not lambda but the movement eta * lambda * mean price: how far alpha, which starts at 1,
goes towards zero in one step of a class of mean price. Its natural scale is one over the number of steps
that alpha has for the way. So one set of constants serves any learning rate and any length of run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autogate.resources import Bilinear
from rewriters.errors import AutogateError

DEFAULT_STEPS = 10_000
"""Length of a run when the caller names none: 25 epochs of CIFAR-10, or 8 of ImageNet at 1024 a batch."""

GAIN = 10.0
"""Movement per unit of error: an error of one tenth takes alpha to zero in `reach` steps."""

INTEGRAL_GAIN = 20.0
"""Movement per unit of error that has lasted for `reach` steps."""

PATIENCE = 1.15
"""Time, in units of `reach`, from which on a missed target is met even if it takes a cruder choice."""

DEADLINE = 0.9
"""Part of the steps by which the target is met."""

ESCALATION = 16.0
"""Between the end of patience and the deadline the movement also grows by a factor of e^16. Gradients can
hold out against a steady lambda, their pull being steepest near zero; against this they can't."""


@dataclass(frozen=True)
class Budget:
    """What a run shall come to, and when.

    Attributes:
        flops: share of the model's FLOPs that shall be left, in (0, 1].
        steps: optimizer steps that the run takes. Epsilon's decay and the target's course are laid over them;
            training on afterwards is plain fine-tuning of what is left. `DEFAULT_STEPS` if none is named.
        reach: part of the steps over which the wanted share falls from `start` to `flops`. A target that is met
            early leaves the channels that stay more time to learn: at 35 % of the steps they came out better
            than at 70 %.
        bound: longest way that one gradient or one price moves alpha in a step, unless the run is so short
            that it takes longer ones: see `step_bound`.
        keep: part of a group's classes that learning leaves alive, at least one class, as long as the target
            can be met without taking them.
        tolerance: how far below the target (and, where nothing else fits, above it) the share may end.
        start: the share before the first step: above 1 where layers were added to the model.

    Raises:
        AutogateError: for a setting outside its range.
    """

    flops: float
    steps: int = DEFAULT_STEPS
    reach: float = 0.35
    bound: float = 0.02
    keep: float = 0.02
    tolerance: float = 0.01
    start: float = 1.0

    def __post_init__(self) -> None:
        ranges = [
            ("flops", 0 < self.flops <= 1, "in (0, 1]"),
            ("steps", self.steps >= 1, "at least 1"),
            ("reach", 0 < self.reach <= 0.7, "in (0, 0.7]"),
            ("bound", self.bound > 0, "positive"),
            ("keep", 0 <= self.keep <= 1, "in [0, 1]"),
            ("tolerance", self.tolerance > 0, "positive"),
            ("start", self.start >= self.flops, "at least the share that shall be left"),
        ]
        for name, holds, wanted in ranges:
            if not holds:
                raise AutogateError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.", where="Budget")

    @property
    def reach_steps(self) -> float:
        """Steps over which the wanted share falls."""
        return max(1.0, self.reach * self.steps)

    @property
    def patience_steps(self) -> float:
        """Steps after which a missed target is met by cruder means."""
        return PATIENCE * self.reach_steps

    @property
    def step_bound(self) -> float:
        """`bound`, or four times the steady pace from 1 to 0 where a short run makes that the larger one."""
        return max(self.bound, 4 / self.reach_steps)

    def wanted(self, step: int) -> float:
        """The share that shall be left after `step` steps: a straight line down to the target, then flat."""
        return self.start - (self.start - self.flops) * min(1.0, step / self.reach_steps)


@dataclass(frozen=True)
class Pressure:
    """The controller's memory and its output.

    Attributes:
        movement: eta * lambda * mean price of this step.
        integral: the part of the movement that past errors account for, in units of 1 / reach steps.
        settled: the target has been met; lambda stays 0 for good.
    """

    movement: float = 0.0
    integral: float = 0.0
    settled: bool = False


def steer(budget: Budget, pressure: Pressure, share: float, step: int) -> Pressure:
    """The pressure of step number `step` (the first is 1), with `share` of the resource left before it.

    A proportional and an integral part while the share lies above the wanted one; no pressure below it,
    where the integral waits, and none in the last step, which leaves every live gate open. A closed gate
    never opens again (its slope is zero), so the way down is the only one, and there is nothing to be
    steered back from.
    """
    if pressure.settled or share <= budget.flops or step >= budget.steps:
        return Pressure(settled=True)
    error = (share - budget.wanted(step)) / (budget.start - budget.flops)
    if error <= 0:
        return replace(pressure, movement=0.0)
    tick = 1 / budget.reach_steps
    integral = pressure.integral + INTEGRAL_GAIN * error * tick
    if step > budget.patience_steps:
        integral *= math.exp(ESCALATION / max(1.0, DEADLINE * budget.steps - budget.patience_steps))
    return Pressure((GAIN * error + integral) * tick, integral)


def keep_counts(groups: Sequence[Sequence[int]], budget: Budget, resource: Bilinear) -> Tensor:
    """How many classes of each group learning leaves alive, int64, shape (groups,).

    `budget.keep` of them, at least one; only one each if the target takes more than that; none at all if it
    can't be met with whole groups alive.
    """
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64)
    wished = torch.ceil(budget.keep * sizes).to(torch.int64).clamp(min=1)
    for counts in (wished, torch.ones_like(sizes)):
        live = torch.zeros(resource.size, dtype=torch.bool)
        for group, count in zip(groups, counts.tolist(), strict=True):
            live[list(group[:count])] = True
        if resource.share(live) <= budget.flops:
            return counts
    return torch.zeros_like(sizes)


@dataclass(frozen=True)
class Deaths:
    """The classes that die in a step.

    Attributes:
        classes: their indices, int64.
        settled: nothing more can be done for the target: the share is as close to it as the classes allow.
    """

    classes: Tensor
    settled: bool = False


class Selection:
    """Chooses, among the classes that the threshold has taken to zero, those that really die.

    The threshold moves all classes, and a step may take more of them to zero than there is need for. Those
    with the smallest alpha die, just enough of them for the wanted share; the rest get to stay.

    All of it runs on the CPU, in the rare step in which something dies, and depends on nothing but its
    arguments: processes that agree on alpha agree on the dead.
    """

    def __init__(self, budget: Budget, resource: Bilinear, groups: Sequence[Sequence[int]]):
        self.budget = budget
        self.resource = resource
        self._group = torch.zeros(resource.size, dtype=torch.int64)
        for index, group in enumerate(groups):
            self._group[list(group)] = index
        self._keep = keep_counts(groups, budget, resource)

    def deaths(self, size: Tensor, candidates: Tensor, live: Tensor, step: int) -> Deaths:
        """The candidates that die in step number `step`.

        Args:
            size: |alpha| after the gradient step, shape (classes,).
            candidates: classes that the threshold took to zero, bool, shape (classes,); all of them live.
            live: classes alive before the step, bool, shape (classes,).
            step: number of this step; the first is 1.
        """
        wanted = self.budget.wanted(step)
        order = self._spared(self._in_order(size, candidates, live), live)
        if self._share_without(live, order) > wanted:
            return Deaths(order)
        enough = self._shortest_prefix(live, order, wanted)
        if self._share_without(live, order[:enough]) >= self.budget.flops - self.budget.tolerance:
            return Deaths(order[:enough])
        return self._land(live, order[: enough - 1], order[enough - 1 :], wanted, step)

    def _in_order(self, size: Tensor, candidates: Tensor, live: Tensor) -> Tensor:
        """The candidates from the smallest alpha to the largest; of equal ones the dearest first."""
        index = torch.nonzero(candidates).flatten()
        index = index[torch.argsort(self.resource.price(live)[index], descending=True, stable=True)]
        return index[torch.argsort(size[index], stable=True)]

    def _spared(self, order: Tensor, live: Tensor) -> Tensor:
        """`order` without the candidates whose death would take their group below what it keeps."""
        groups = self._group[order]
        alive = torch.bincount(self._group[live], minlength=len(self._keep))
        may_go = (alive - self._keep).clamp(min=0)
        by_group = torch.argsort(groups, stable=True)
        sizes = torch.bincount(groups, minlength=len(self._keep))
        begins = torch.cumsum(sizes, 0) - sizes
        place = torch.empty_like(order)
        place[by_group] = torch.arange(len(order)) - begins[groups[by_group]]
        return order[place < may_go[groups]]

    def _share_without(self, live: Tensor, dead: Tensor) -> float:
        return self.resource.share(live.index_fill(0, dead, False))

    def _shortest_prefix(self, live: Tensor, order: Tensor, wanted: float) -> int:
        """The least number of candidates, taken in order, whose death brings the share to `wanted`."""
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self._share_without(live, order[:middle]) <= wanted:
                high = middle
            else:
                low = middle + 1
        return low

    def _land(self, live: Tensor, dead: Tensor, rest: Tensor, wanted: float, step: int) -> Deaths:
        """The last classes before the target: those too dear for it are passed over for cheaper ones.

        A target that no candidate fits is left to the steps to come, which bring others. But the pressure
        that brings them lies on all classes, so it isn't kept up for long: what is settled for rises from
        nothing to the tolerance above the target until patience is over. Then the cheapest candidate dies.
        """
        lowest = (self.budget.flops - self.budget.tolerance) * self.resource.whole
        live = live.index_fill(0, dead, False)
        chosen = dead.tolist()
        value = float(self.resource.value(live))
        while value > wanted * self.resource.whole:
            drop = self.resource.drop(live)[rest]
            fitting = torch.nonzero(value - drop >= lowest).flatten()
            if len(fitting) == 0:
                return self._settle_for(live, chosen, rest, value, step)
            first = int(fitting[0])
            chosen.append(int(rest[first]))
            live[rest[first]] = False
            rest = torch.cat([rest[:first], rest[first + 1 :]])
            value = float(self.resource.value(live))
        return Deaths(torch.tensor(chosen, dtype=torch.int64))

    def _settle_for(self, live: Tensor, chosen: list[int], rest: Tensor, value: float, step: int) -> Deaths:
        waited = (step / self.budget.reach_steps - 1) / (PATIENCE - 1)
        above = value / self.resource.whole - self.budget.flops
        close = above <= self.budget.tolerance * min(1.0, waited)
        if not close and waited >= 1 and len(rest):
            chosen = [*chosen, int(rest[torch.argmin(self.resource.drop(live)[rest])])]
        return Deaths(torch.tensor(chosen, dtype=torch.int64), settled=close)
