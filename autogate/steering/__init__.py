"""How a run reaches its targets: how hard gates are pushed in a step, and which of those that reach zero die."""

from autogate.steering.controller import Pressure, steer
from autogate.steering.course import Course, Range
from autogate.steering.groups import Group, Narrowing, groups_of
from autogate.steering.least_widths import fewest_live, part_alike, with_needed
from autogate.steering.limits import Bounds, Limit, exceeded, limited, read_limits
from autogate.steering.schedule import Schedule
from autogate.steering.selection import Deaths, Selection

__all__ = [
    "Bounds",
    "Course",
    "Deaths",
    "Group",
    "Limit",
    "Narrowing",
    "Pressure",
    "Range",
    "Schedule",
    "Selection",
    "exceeded",
    "fewest_live",
    "groups_of",
    "limited",
    "part_alike",
    "read_limits",
    "steer",
    "with_needed",
]
