"""The course of a run as plain numbers."""

import pytest

import autogate
from autogate.saliency import SANP, Run
from autogate.saliency.run import RunState


def test_lambda_is_that_of_equation_10():
    run = Run(0.4, 100, 0.0, SANP.published(lam=0.01))
    pushes = [run.dose(RunState(50, cost), 123.0, 30).push * 30 for cost in (1.0, 0.7, 0.4, 0.1)]
    assert pushes == pytest.approx([0.01 * 0.6, 0.01 * 0.3, 0.0, -0.01 * 0.3])
    assert all(abs(push) <= 0.01 for push in pushes)


def test_there_is_no_penalty_while_modules_warm_up():
    run = Run(0.4, 100, 0.1)
    assert run.warm_steps == 10
    assert run.dose(RunState(9, 1.0), 1.0, 30).push == 0
    assert run.dose(RunState(30, 1.0), 1.0, 30).push > 0
    state = RunState()
    for _ in range(10):
        state = run.step(state, 1.0)
    assert state == RunState(10, pytest.approx(1.0), 0.0, 0.0)


def test_the_wanted_cost_falls_to_the_budget():
    run = Run(0.4, 1000, 0.1)
    assert run.wanted(0) == run.wanted(100) == 1
    assert run.wanted(235) == pytest.approx(0.7)
    assert run.wanted(370) == run.wanted(1000) == pytest.approx(0.4)


def test_the_pressure_is_steered_and_bounded():
    run, level = Run(0.4, 1000), 0.25
    above, far = RunState(500, 0.45), RunState(500, 1.0)
    assert 0 < run.dose(above, level, 30).push < run.dose(far, level, 30).push == level * run.method.most
    assert run.dose(RunState(500, 0.3), level, 30).push == 0


def test_the_threshold_follows_the_cost_once_the_wanted_cost_is_the_budget():
    run = Run(0.4, 1000)
    assert run.step(RunState(200, 0.9), 0.9).threshold == 0
    assert run.step(RunState(500, 0.5), 0.5).threshold == pytest.approx(0.125)
    assert run.step(RunState(500, 0.3), 0.3).threshold == pytest.approx(-0.125)


def test_noise_and_soft_codes_fade():
    run = Run(0.4, 1000)
    doses = [run.dose(RunState(steps, 0.4), 1.0, 30) for steps in (0, 700, 775, 850, 2000)]
    assert [dose.soft for dose in doses] == pytest.approx([0.5, 0.5, 0.25, 0, 0])
    assert [dose.noise for dose in doses] == pytest.approx([0.3, 0.3, 0.15, 0, 0])
    published = Run(0.4, 1000, 0.1, SANP.published())
    assert published.dose(RunState(1000, 0.4), 1.0, 30)[1:3] == (1.0, 0.5)


@pytest.mark.parametrize(
    "wrong", [{"flops": 0}, {"flops": 1}, {"flops": 1.5}, {"steps": 0}, {"warmup": -0.1}, {"warmup": 0.6}]
)
def test_values_outside_of_their_range_are_refused(wrong):
    with pytest.raises(autogate.AutogateError, match=next(iter(wrong))):
        Run(**{"flops": 0.5, "steps": 10, **wrong})


@pytest.mark.parametrize(
    "wrong", [{"reduction": 0}, {"noise": -1}, {"sharpness": 0}, {"lam": 0}, {"reach": 0.8}, {"hard": 0.4}]
)
def test_settings_outside_of_their_range_are_refused(wrong):
    with pytest.raises(autogate.AutogateError, match=next(iter(wrong))):
        SANP(**wrong)
