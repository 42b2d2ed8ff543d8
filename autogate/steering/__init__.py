"""How a run reaches its targets: how hard gates are pushed in a step, and which of those that reach zero die."""

from autogate.steering.controller import Pressure, steer
from autogate.steering.course import Course, Range
from autogate.steering.schedule import Schedule
from autogate.steering.selection import (
    Deaths,
    Group,
    Narrowing,
    Selection,
    fewest_live,
    groups_of,
    part_alike,
    with_needed,
)

__all__ = [
    "Course",
    "Deaths",
    "Group",
    "Narrowing",
    "Pressure",
    "Range",
    "Schedule",
    "Selection",
    "fewest_live",
    "groups_of",
    "part_alike",
    "steer",
    "with_needed",
]
