"""The schedule of a run, and the controller that follows it."""

import pytest

from autogate.steering.controller import Pressure, steer
from autogate.steering.course import Course
from autogate.steering.schedule import Schedule
from rewriters.errors import AutogateError


@pytest.mark.parametrize(("name", "value"), [("reach", 1.0), ("keep", 2.0), ("tolerance", 0.0), ("patience", 1.0)])
def test_settings_outside_their_range_are_refused(name, value):
    with pytest.raises(AutogateError, match=f"Course: {name} is {value}; it must be"):
        Course(**{name: value})


@pytest.mark.parametrize("steps", [0, 2.5, "9", float("nan"), float("inf")])
def test_a_run_has_a_whole_number_of_steps(steps):
    with pytest.raises(AutogateError, match=f"steps is {steps!r}; it must be a whole number from 1 up"):
        Schedule(steps)


def test_a_whole_number_may_be_written_as_a_float():
    assert repr(Schedule(5e3).steps) == "5000"


@pytest.mark.parametrize(
    ("steps", "taken"), [(30_000, 3000), (2000, 200), (1000, 200), (572, 200), (300, 105), (20, 7), (1, 1)]
)
def test_the_wanted_distance_falls_to_the_target_and_stays(steps, taken):
    """Over a tenth of the run, but over 200 steps at the least, and of a short run over 35 % at the most."""
    schedule = Schedule(steps)
    assert schedule.reach_steps == pytest.approx(taken, rel=0.002)
    assert schedule.wanted(0) == 1
    assert schedule.wanted(taken / 2) == pytest.approx(0.5, rel=0.01)
    assert schedule.wanted(taken + 1) == schedule.wanted(steps + 1) == 0


def test_no_pressure_ahead_of_the_course_and_the_integral_waits():
    schedule = Schedule(steps=1000)
    pressed = steer(schedule, Pressure(), 1.0, 100)
    assert pressed.movement > 0 and pressed.integral > 0
    released = steer(schedule, pressed, 0.2, 101)
    assert released.movement == 0 and released.integral == pressed.integral and not released.settled


def test_pressure_ends_for_good_when_the_target_is_met():
    schedule = Schedule(steps=1000)
    settled = steer(schedule, Pressure(integral=3.0), 0.0, 400)
    assert settled.settled and settled.movement == 0
    assert steer(schedule, settled, 0.8, 401) == settled


def test_pressure_is_the_same_course_at_every_length_of_run():
    """Alpha of mean price goes the same way in the same part of the way down, whatever the run's length."""
    ways = []
    for steps in (300, 30_000):
        schedule, pressure, way = Schedule(steps), Pressure(), 0.0
        for step in range(1, int(0.6 * schedule.reach_steps)):
            pressure = steer(schedule, pressure, 1.0, step)
            way += pressure.movement
        ways.append(way)
    assert ways[0] == pytest.approx(ways[1], rel=0.1)


def test_pressure_outgrows_every_gradient_before_the_deadline():
    for steps in (100, 10_000):
        schedule, pressure = Schedule(steps), Pressure()
        for step in range(1, int(0.9 * steps)):
            pressure = steer(schedule, pressure, 0.04, step)
        assert pressure.movement > 0.2
