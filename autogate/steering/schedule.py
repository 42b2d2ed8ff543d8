"""The course of a run in steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from autogate.steering.course import Course
from rewriters import AutogateError


def whole_number(name: str, value: Any) -> int:
    """The value of an argument that counts something; `1e4` is a whole number too.

    Raises:
        AutogateError: it is no whole number from 1 up.
    """
    real = isinstance(value, Real)
    if not (real and value >= 1 and value == value // 1):
        raise AutogateError(f"{name} is {value!r}; it must be a whole number from 1 up.", where="prepare")
    return int(value)


@dataclass(frozen=True)
class Schedule:
    """The course of a run in steps.

    Attributes:
        steps: optimizer steps of the run. The targets are reached within them. Training after them is plain
            fine-tuning of what is left. The default is 25 epochs of CIFAR-10, or 8 of ImageNet with batches of 1024.
        course: how the run goes to its targets; a method has these settings.

    Raises:
        AutogateError: there are no steps.
    """

    steps: int = 10_000
    course: Course = field(default_factory=Course)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole_number("steps", self.steps))

    @property
    def reach_steps(self) -> float:
        """Steps over which the wanted shares fall."""
        course = self.course
        return max(1.0, course.reach * self.steps, min(course.least_steps, course.short * self.steps))

    @property
    def patience_steps(self) -> float:
        """Steps after which a missed target is met by a cruder choice of channels."""
        return self.course.patience * self.reach_steps

    def wanted(self, step: int) -> float:
        """The distance from the targets (see `Targets`) wanted after `step` steps: a straight line from 1 to 0."""
        return 1 - min(1.0, step / self.reach_steps)
