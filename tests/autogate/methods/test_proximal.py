"""Soft threshold, shrinkage and alternating relaxation."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autogate.budget.products import Products, Term
from autogate.budget.resource import SideCounts
from autogate.methods.proximal import alternating_relaxation, shrinkage, soft_threshold


@settings(max_examples=50)
@given(st.floats(-2, 2), st.floats(0, 1.5))
def test_soft_threshold_matches_brute_force_minimiser(alpha, beta):
    points = torch.linspace(-2.5, 2.5, 50_001, dtype=torch.float64)
    best = points[((points - alpha) ** 2 / 2 + beta * points.abs()).argmin()]
    found = soft_threshold(torch.tensor(alpha, dtype=torch.float64), beta)
    assert abs(found - best) <= 1.01e-4


def test_soft_threshold_gives_exact_zeros():
    alpha = torch.tensor([0.02, -0.02, 0.05, -0.05, 0.0])
    assert soft_threshold(alpha, 0.02).tolist()[:2] == [0, 0]
    torch.testing.assert_close(soft_threshold(alpha, 0.02), torch.tensor([0, 0, 0.03, -0.03, 0]))


def test_shrinkage_is_bounded_until_the_mean_price_moves_further_than_the_bound():
    price = torch.tensor([0.1, 1.0, 10.0])
    torch.testing.assert_close(shrinkage(price, 0.001, 0.02), torch.tensor([0.0001, 0.001, 0.01]))
    torch.testing.assert_close(shrinkage(price, 0.01, 0.02), torch.tensor([0.001, 0.01, 0.02]))
    torch.testing.assert_close(shrinkage(price, 0.5, 0.02), torch.tensor([0.05, 0.5, 0.5]))


def figure_4() -> Products:
    """|x|_0 |y|_0 for x of two entries (classes 0 and 1) and y of three."""
    return Products(SideCounts(5, [0.0, 0.0], [[0, 1], [2, 3, 4]]), [Term(1.0, 0, 1)])


def test_figure_4_converges():
    target = torch.tensor([0.1, 0.2, -0.3, 0.5, 0.6])
    # c = 0.01: x falls by 0.01 * |y|_0 = 0.03, y by 0.01 * |x|_0 = 0.02.
    limit = torch.tensor([0.07, 0.17, -0.28, 0.48, 0.58])
    for start in ([0.1, 0.8, 0.7, 0.3, 0.8], [0.4, 0.1, 0.7, 0.5, 0.0]):
        courses = [
            alternating_relaxation(target, figure_4().price, 0.01, torch.tensor(start), iterations)
            for iterations in range(1, 6)
        ]
        torch.testing.assert_close(courses[1], limit)
        assert all(torch.equal(alpha, courses[1]) for alpha in courses[1:])


def test_price_counts_the_other_side_only_while_it_lives():
    """In init2 y's last entry is zero at first: x is charged for two, and for three once it is not."""
    target = torch.tensor([0.1, 0.2, -0.3, 0.5, 0.6])
    start = torch.tensor([0.4, 0.1, 0.7, 0.5, 0.0])
    first = alternating_relaxation(target, figure_4().price, 0.01, start)
    torch.testing.assert_close(first[:2], torch.tensor([0.08, 0.18]))


def test_relaxation_is_stationary_for_its_own_l1_problem():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, generator=generator)
    alpha = alternating_relaxation(target, figure_4().price, 0.2, torch.ones(5), 10)
    beta = 0.2 * figure_4().price(alpha != 0).float()
    pulled = target - alpha
    assert torch.allclose(pulled[alpha != 0], (beta * alpha.sign())[alpha != 0])
    assert (pulled.abs() <= beta)[alpha == 0].all()
