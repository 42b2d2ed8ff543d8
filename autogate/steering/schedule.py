"""How a run goes down to its targets, and the controller that steers lambda for it.

The paper sets lambda by hand and names that as its disadvantage (Guo et al., "GDP", section 5). Here the
user names the shares that shall be left, and lambda follows from how far the model is from them.

What is steered is not lambda but the movement eta * lambda * mean price: how far alpha, which starts at 1,
goes towards zero in one step of a class of mean price. Its natural scale is one over the number of steps
that alpha has for the way. So one set of constants serves any learning rate and any length of run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rewriters import AutogateError

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


LEAST_STEPS = 200
"""Steps that the way down takes at the least, for gradients to tell classes apart: a batch says little."""

SHORT = 0.35
"""But no larger part of the run than this: what is left has to learn too."""


@dataclass(frozen=True)
class Schedule:
    """How a run goes down to its targets: how fast, in what portions, how closely.

    Attributes:
        steps: optimizer steps that the run takes. The targets' course and epsilon's are parts of them; training on
            afterwards is plain fine-tuning of what is left. `DEFAULT_STEPS` if none is named.
        reach: part of the steps over which the wanted shares fall from the start to the targets, and epsilon to its
            end. A run so short that these would be less than `LEAST_STEPS` takes a larger part. A target that is
            met early leaves the channels that stay more time to learn: docs/benchmarks.md has the figures.
        bound: longest way that one gradient or one price moves alpha in a step, unless the run is so short
            that it takes longer ones: see `step_bound`.
        keep: the least width that learning leaves a layer, as a part of the one it would have if all were
            narrowed alike for the same targets. A dear layer would otherwise be driven to nothing before its
            channels could speak (section 4.3). More of it takes from channels that the loss depends on.
        tolerance: how far below the target (and, where nothing else fits, above it) a share may end.
        round_to: channels of a layer die in such numbers that a multiple of this stays. A layer that loses
            none keeps the width it has.

    Raises:
        AutogateError: for a setting outside its range.
    """

    steps: int = DEFAULT_STEPS
    reach: float = 0.1
    bound: float = 0.02
    keep: float = 0.2
    tolerance: float = 0.01
    round_to: int = 1

    def __post_init__(self) -> None:
        ranges = [
            ("steps", self.steps >= 1, "at least 1"),
            ("reach", 0 < self.reach <= 0.7, "in (0, 0.7]"),
            ("bound", self.bound > 0, "positive"),
            ("keep", 0 <= self.keep <= 1, "in [0, 1]"),
            ("tolerance", self.tolerance > 0, "positive"),
            ("round_to", self.round_to >= 1 and self.round_to == int(self.round_to), "a whole number from 1 up"),
        ]
        for name, holds, wanted in ranges:
            if not holds:
                raise AutogateError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.", where="prepare")

    @property
    def reach_steps(self) -> float:
        """Steps over which the wanted shares fall, and epsilon."""
        return max(1.0, self.reach * self.steps, min(LEAST_STEPS, SHORT * self.steps))

    @property
    def patience_steps(self) -> float:
        """Steps after which a missed target is met by cruder means."""
        return PATIENCE * self.reach_steps

    @property
    def step_bound(self) -> float:
        """`bound`, or four times the steady pace from 1 to 0 where a short run makes that the larger one."""
        return max(self.bound, 4 / self.reach_steps)

    def wanted(self, step: int) -> float:
        """The distance from the targets (see `Targets`) that `step` steps should leave: a straight line to 0."""
        return 1 - min(1.0, step / self.reach_steps)


@dataclass(frozen=True)
class Pressure:
    """The controller's memory and its output.

    Attributes:
        movement: eta * lambda * mean price of this step.
        integral: the part of the movement that past errors account for, in units of 1 / reach steps.
        settled: the targets have been met; lambda stays 0 for good.
    """

    movement: float = 0.0
    integral: float = 0.0
    settled: bool = False


def steer(schedule: Schedule, pressure: Pressure, distance: float, step: int) -> Pressure:
    """The pressure of step number `step` (the first is 1), at this distance from the targets before it.

    A proportional and an integral part while the model is further from its targets than wanted; no pressure
    where it is nearer, where the integral waits, and none in the last step, which leaves every live gate
    open. A closed gate never opens again (its slope is zero), so the way down is the only one, and there is
    nothing to be steered back from.
    """
    if pressure.settled or distance <= 0 or step >= schedule.steps:
        return Pressure(settled=True)
    error = distance - schedule.wanted(step)
    if error <= 0:
        return replace(pressure, movement=0.0)
    tick = 1 / schedule.reach_steps
    integral = pressure.integral + INTEGRAL_GAIN * error * tick
    if step > schedule.patience_steps:
        integral *= math.exp(ESCALATION / max(1.0, DEADLINE * schedule.steps - schedule.patience_steps))
    return Pressure((GAIN * error + integral) * tick, integral)
