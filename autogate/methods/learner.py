"""A step of alpha: the gradient, the price, the deaths. Values in, values out; the kernels aren't known here.

Guo et al., "GDP", section 3.4: equations 8 and 9, algorithm 1 with N = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from autogate.budget import Targets
from autogate.methods.gate_function import EPSILON_START, epsilon_at, gate_slope
from autogate.methods.proximal import shrinkage, soft_threshold
from autogate.methods.sensitivity import observed, price_per_sensitivity
from autogate.steering import Group, Pressure, Schedule, Selection, steer

ALPHA_RATE = 1e-4
"""Alpha's learning rate where the kernels' is at its peak; it falls and rises with theirs."""

OPEN_ALPHA = 1e-3
"""No gradient takes alpha nearer to zero than this, and no live one is nearer when there is no pressure: at
the epsilon that a run ends with the gate is then open (0.95), so a gate is either that or exactly closed."""

LEAST_ALPHA = 1e-5
"""The least alpha of a live class. Its gate is above 1e-9, small enough to be as good as closed and large
enough for a float32 kernel to be scaled down by it and up again."""


@dataclass(frozen=True)
class Gates:
    """The gates between two steps.

    Attributes:
        alpha: float32, shape (classes,): the learnable parameters, zero for dead classes.
        live: bool, shape (classes,).
        epsilon: 0-dim float64, the gates' smoothing constant.
        count: steps taken.
        pressure: the controller's memory.
        peak: the largest learning rate of the kernels so far.
        sensitivity: float64, shape (classes,): how much the loss depends on each gate (`sensitivity.py`).
        balance: lambda of equation 7 in the latest step, with prices relative to their mean.
    """

    alpha: Tensor
    live: Tensor
    epsilon: Tensor
    sensitivity: Tensor
    count: int = 0
    pressure: Pressure = field(default_factory=Pressure)
    peak: float = 0.0
    balance: float = 0.0

    @classmethod
    def fresh(cls, size: int) -> Gates:
        """All of them open."""
        epsilon = torch.tensor(EPSILON_START, dtype=torch.float64)
        return cls(
            alpha=torch.ones(size),
            live=torch.ones(size, dtype=torch.bool),
            epsilon=epsilon,
            sensitivity=torch.zeros(size, dtype=torch.float64),
        )


class Standing(NamedTuple):
    """Where the live classes stand: the distance from the targets, and each class's relative price."""

    distance: float
    price: Tensor


class Learner:
    """Moves alpha towards its targets.

    Args:
        targets: what shall be left; all of them are met.
        schedule: when, and in what portions.
        groups: classes that lie together.
    """

    def __init__(self, targets: Targets, schedule: Schedule, groups: Sequence[Group]):
        self.targets = targets
        self.schedule = schedule
        self._selection = Selection(targets, schedule, groups)

    def stand(self, live: Tensor) -> Standing:
        """Where these live classes (bool, shape (classes,)) stand."""
        on_host = live.cpu()
        return Standing(self.targets.distance(on_host), self.targets.price(on_host).to(live.device, torch.float32))

    def step(self, gates: Gates, gradient: Tensor, lr: float, standing: Standing | None = None) -> Gates:
        """The gates after one step.

        Args:
            gates: as they are before it.
            gradient: dL/dg of every class, float32, shape (classes,).
            lr: the kernels' learning rate.
            standing: what `stand` tells of its live classes, if it is known.
        """
        distance, price = self.stand(gates.live) if standing is None else standing
        count = gates.count + 1
        pressure = steer(self.schedule, gates.pressure, distance, count)
        sensitivity = observed(gates.sensitivity, gradient)
        peak = max(gates.peak, lr)
        rate = ALPHA_RATE * lr / peak if peak else 0.0
        target = self.descend(gates, gradient, rate)
        if pressure.movement > 0:
            price = price_per_sensitivity(price, sensitivity, gates.live)
            alpha, deaths_settle = self.threshold(gates.live, target, price, pressure.movement, count)
            pressure = replace(pressure, settled=deaths_settle)
        else:
            alpha = _away_from_zero(target, OPEN_ALPHA)
        alpha = torch.where(gates.live, alpha, 0.0)
        return Gates(
            alpha=alpha,
            live=alpha != 0,
            epsilon=torch.full_like(gates.epsilon, epsilon_at(count, self.schedule.reach_steps)),
            sensitivity=sensitivity,
            count=count,
            pressure=pressure,
            peak=peak,
            balance=pressure.movement / rate if rate else 0.0,
        )

    def is_over(self, count: int, settled: bool) -> bool:
        """Whether gates have learned what they can after `count` steps, and stand still from here on.

        The run is over, or the targets are met and epsilon is at its end: every live gate is open then, by 0.95 at the
        least, and so steep near zero alone that no gradient moves it.
        """
        return count >= self.schedule.steps or (settled and count >= self.schedule.reach_steps)

    def descend(self, gates: Gates, gradient: Tensor, rate: float) -> Tensor:
        """Alpha after its bounded gradient step, equation 8, which neither crosses zero nor comes to it.

        Near alpha = sqrt(epsilon / 3) the gate's slope is 0.65 / sqrt(epsilon), without limit as epsilon
        falls: unbounded steps leap over zero and open a gate that was about to close.
        """
        bound = self.schedule.step_bound
        slope = gate_slope(gates.alpha, gates.epsilon)
        moved = gates.alpha - torch.clamp(rate * gradient * slope, -bound, bound)
        sign = torch.sign(gates.alpha)
        nearest = torch.clamp(gates.alpha.abs(), max=OPEN_ALPHA)
        return sign * torch.maximum(sign * moved, nearest)

    def threshold(
        self, live: Tensor, target: Tensor, price: Tensor, movement: float, count: int
    ) -> tuple[Tensor, bool]:
        """Equation 9 with the deaths chosen: alpha after it, and whether the targets are given up as met."""
        shrunk = soft_threshold(target, shrinkage(price, movement, self.schedule.step_bound))
        candidates = live & (shrunk == 0)
        alpha = torch.where(candidates, target, shrunk)
        if not candidates.any():
            return _away_from_zero(alpha, LEAST_ALPHA), False
        deaths = self._selection.deaths(target.abs().cpu(), candidates.cpu(), live.cpu(), count)
        alpha = _away_from_zero(alpha, OPEN_ALPHA if deaths.settled else LEAST_ALPHA)
        return alpha.index_fill_(0, deaths.classes.to(alpha.device), 0.0), deaths.settled


def _away_from_zero(alpha: Tensor, least: float) -> Tensor:
    """Alpha with every magnitude below `least` raised to it; alpha has no zeros where it counts."""
    return torch.where(alpha.abs() < least, torch.copysign(alpha.new_tensor(least), alpha), alpha)
