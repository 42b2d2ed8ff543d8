"""The gate function and its derivative."""

from itertools import pairwise

import torch

from autogate.methods.gate_function import epsilon_at, gate_slope, gate_value
from autogate.methods.gdp import GDP

EPSILON_START, EPSILON_END = GDP().epsilon_start, GDP().epsilon_end


def test_gate_starts_where_the_paper_starts():
    assert abs(gate_value(torch.tensor(1.0), EPSILON_START).item() - 1 / 1.1) < 1e-7


def test_gate_is_exactly_zero_at_zero_and_nowhere_else():
    alpha = torch.tensor([0.0, 1e-5, -1e-5, 0.3])
    for epsilon in (EPSILON_START, EPSILON_END):
        assert ((gate_value(alpha, epsilon) == 0) == (alpha == 0)).all()


def test_gate_becomes_a_step_as_epsilon_falls():
    alpha = torch.linspace(0.01, 1, 50)
    assert (gate_value(alpha, EPSILON_END) > 0.999).all()
    assert gate_value(alpha, EPSILON_START).min() < 0.01


def test_slope_is_the_gates_derivative():
    alpha = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    for epsilon in (0.1, 1e-3):
        (expected,) = torch.autograd.grad(gate_value(alpha, epsilon).sum(), alpha)
        torch.testing.assert_close(gate_slope(alpha.detach(), epsilon), expected)


def test_slope_is_steepest_near_the_root_of_a_third_of_epsilon():
    alpha = torch.linspace(1e-4, 1, 100_000, dtype=torch.float64)
    for epsilon in (0.1, 1e-3):
        slope = gate_slope(alpha, epsilon)
        assert abs(alpha[slope.argmax()].item() - (epsilon / 3) ** 0.5) < 1e-4
        assert abs(slope.max().item() * epsilon**0.5 - 0.65) < 0.01


def test_epsilon_decays_by_a_constant_factor_and_stays():
    course = [epsilon_at(step, 20, EPSILON_START, EPSILON_END) for step in range(30)]
    assert course[0] == EPSILON_START
    ratios = [after / before for before, after in pairwise(course[:21])]
    assert max(ratios) - min(ratios) < 1e-12
    assert all(abs(epsilon / EPSILON_END - 1) < 1e-12 for epsilon in course[20:])
