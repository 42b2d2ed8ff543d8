"""The course of a run to its targets, and the controller that steers lambda.

The paper sets lambda by hand and names that as its disadvantage (Guo et al., "GDP", section 5). Here the user names the
shares to be left, and lambda follows from the distance between the model and these targets.

The controller does not steer lambda itself. It steers the movement eta * lambda * mean price: how far one step takes
the alpha of a class of mean price towards zero. Alpha starts at 1, so the natural scale of the movement is one over the
number of steps that alpha has to get to 0. One set of constants therefore serves any learning rate and run length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rewriters import AutogateError

DEFAULT_STEPS = 10_000
"""Length of a run if the caller names none: 25 epochs of CIFAR-10, or 8 of ImageNet with batches of 1024."""

GAIN = 10.0
"""Movement per unit of error. An error of one tenth takes alpha to zero in `reach` steps."""

INTEGRAL_GAIN = 20.0
"""Movement per unit of error that has lasted for `reach` steps."""

PATIENCE = 1.15
"""Time, in units of `reach`, after which a missed target is met by a cruder choice of channels."""

DEADLINE = 0.9
"""The target is met within this part of the steps."""

ESCALATION = 16.0
"""Between the end of patience and the deadline the movement also grows by a factor of e^16. Gradients pull hardest near
zero and can resist a steady lambda; they can't resist this."""


LEAST_STEPS = 200
"""The way down takes at least this many steps, because one batch says little about which classes matter."""

SHORT = 0.35
"""But at most this part of the run, because what is left needs steps to learn."""


@dataclass(frozen=True)
class Schedule:
    """The course of a run to its targets: how fast, in what portions, how closely.

    Attributes:
        steps: optimizer steps of the run. The targets and epsilon are reached within them. Training after them is plain
            fine-tuning of what is left.
        reach: part of the steps over which the wanted shares fall from 1 to the targets, and epsilon to its end. If
            these would be less than `LEAST_STEPS` steps, they are a larger part of the run. Targets that are met
            early leave the remaining channels more time to learn; docs/benchmarks.md has the figures.
        bound: the longest way that a gradient or a price moves alpha in one step. Short runs need longer steps: see
            `step_bound`.
        keep: the least width that learning leaves a layer, as a part of the width it would have if all layers were
            narrowed uniformly for the same targets. Without it an expensive layer would be emptied before its
            gradients could hold it (section 4.3). A larger value removes channels elsewhere that the loss depends on.
        tolerance: how far below the target (and, where nothing else fits, above it) a share may end.
        round_to: a layer that loses channels keeps a multiple of this number. A layer that loses none keeps its
            width.

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
        """Steps over which the wanted shares and epsilon fall."""
        return max(1.0, self.reach * self.steps, min(LEAST_STEPS, SHORT * self.steps))

    @property
    def patience_steps(self) -> float:
        """Steps after which a missed target is met by a cruder choice of channels."""
        return PATIENCE * self.reach_steps

    @property
    def step_bound(self) -> float:
        """`bound`, or in a short run four times the steady pace from 1 to 0, if that is larger."""
        return max(self.bound, 4 / self.reach_steps)

    def wanted(self, step: int) -> float:
        """The distance from the targets (see `Targets`) wanted after `step` steps: a straight line from 1 to 0."""
        return 1 - min(1.0, step / self.reach_steps)


@dataclass(frozen=True)
class Pressure:
    """The controller's memory and its output.

    Attributes:
        movement: eta * lambda * mean price of this step.
        integral: the part of the movement due to past errors, in units of 1 / reach steps.
        settled: the targets have been met, and lambda stays 0.
    """

    movement: float = 0.0
    integral: float = 0.0
    settled: bool = False


def steer(schedule: Schedule, pressure: Pressure, distance: float, step: int) -> Pressure:
    """The pressure of a step: a proportional and an integral part of the error.

    There is pressure while the model is further from its targets than wanted. There is none while it is nearer (the
    integral waits), and none in the last step, which leaves every live gate open. A closed gate never opens again (its
    slope is zero), so an overshoot could not be corrected.

    Args:
        schedule: the course of the run.
        pressure: of the step before.
        distance: from the targets, before this step.
        step: number of this step; the first is 1.
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
