"""The controller: it steers lambda by the distance between the model and its targets.

The paper sets lambda by hand and names that as its disadvantage (Guo et al., "GDP", section 5). Here the user names the
shares to be left, and lambda follows from the distance between the model and these targets.

The controller does not steer lambda itself. It steers the movement eta * lambda * mean price: how far one step takes
the alpha of a class of mean price towards zero. Alpha starts at 1, so the natural scale of the movement is one over the
number of steps that alpha has to get to 0. One set of constants (see `Course`) therefore serves any learning rate and
run length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from autogate.steering.schedule import Schedule


@dataclass(frozen=True)
class Pressure:
    """The controller's memory and its output.

    Attributes:
        movement: eta * lambda * mean price of this step.
        integral: the part of the movement due to past errors, in units of 1 / reach steps.
        settled: lambda stays 0: the targets have been met, or the steps are over.
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
    course = schedule.course
    integral = pressure.integral + course.integral_gain * error * tick
    if step > schedule.patience_steps:
        integral *= math.exp(course.escalation / max(1.0, course.deadline * schedule.steps - schedule.patience_steps))
    return Pressure((course.gain * error + integral) * tick, integral)
