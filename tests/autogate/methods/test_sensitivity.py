"""Classes that the loss depends on little close first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autogate.budget.products import Products, Term
from autogate.budget.resource import SideCounts
from autogate.budget.targets import Target, Targets
from autogate.methods.gdp import GDP
from autogate.methods.learner import Learner
from autogate.methods.method import Gates
from autogate.methods.proximal import soft_threshold
from autogate.methods.sensitivity import observed, price_per_sensitivity
from autogate.steering.groups import Group

STEPS = 400


def learner(sizes: list[int], prices: list[float], share: float) -> Learner:
    """Of groups that cost so much for each of their classes, a sum without products."""
    ends, start = [], 0
    for size in sizes:
        ends.append(list(range(start, start + size)))
        start += size
    counts = SideCounts(start, [0.0] * len(sizes), ends)
    resource = Products(counts, [Term(price, end) for end, price in enumerate(prices)])
    targets = Targets([Target(resource, share)])
    return Learner(GDP(keep=0.0), targets, [Group(tuple(end)) for end in ends], STEPS)


def run(of: Learner, strengths: Tensor, scale: float = 1.0) -> Gates:
    """Gates under gradients that are noise, as open gates' are, of a size of their own each."""
    generator = torch.Generator().manual_seed(0)
    gates = of.start()
    for _step in range(STEPS):
        noise = torch.randn(len(strengths), generator=generator)
        gates = of.step(gates, scale * strengths * noise * gates.live, 0.1)
    return gates


def test_of_one_price_those_die_that_the_loss_depends_on_least():
    strengths = torch.logspace(-2, 0, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    gates = run(learner([40], [1.0], 0.5), strengths)
    assert int(gates.live.sum()) == 20
    assert torch.equal(gates.live, strengths > strengths.median())


def test_a_dear_class_dies_before_a_cheap_one_the_loss_depends_on_as_much():
    gates = run(learner([20, 20], [1.0, 8.0], 0.6), torch.ones(40))
    assert gates.live[:20].all() and not gates.live[20:].all()


def test_a_dear_class_outlives_a_cheap_one_where_the_loss_depends_on_it_the_more():
    # Curvatures are squares: 0.05 and 1 for prices of 1 and 4.
    strengths = torch.cat([torch.full((20,), 0.05**0.5), torch.ones(20)])
    gates = run(learner([20, 20], [1.0, 4.0], 0.9), strengths)
    assert gates.live[20:].all() and not gates.live[:20].all()


def test_the_unit_of_the_loss_does_not_matter():
    strengths = torch.logspace(-2, 0, 24)
    small, large = (run(learner([24], [1.0], 0.4), strengths, scale).live for scale in (1e-6, 1e4))
    assert torch.equal(small, large)


def test_gates_that_are_still_needed_stay_open_on_the_way():
    strengths = torch.logspace(-2, 0, 40)
    of = learner([40], [1.0], 0.5)
    generator, gates, closing = torch.Generator().manual_seed(0), of.start(), 0
    for _step in range(STEPS):
        gates = of.step(gates, strengths * torch.randn(40, generator=generator) * gates.live, 0.1)
        closing = max(closing, int((gates.live & (of.method.factor(gates.alpha, gates.state) < 0.5))[-10:].sum()))
    assert closing == 0


@pytest.mark.parametrize("sensitivity", [torch.zeros(6), torch.full((6,), 3.0)])
def test_where_all_gates_matter_alike_the_price_alone_counts(sensitivity):
    price = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    found = price_per_sensitivity(price, sensitivity.double(), torch.ones(6, dtype=torch.bool), 0.05)
    assert torch.allclose(found, price / 2)


def test_prices_are_relative_to_the_mean_of_live_classes_and_none_without_them():
    live = torch.tensor([True, False, True, True])
    sensitivity = torch.tensor([1.0, 1e30, 4.0, 0.0], dtype=torch.float64)
    found = price_per_sensitivity(torch.ones(4), sensitivity, live, 0.05)
    assert found[live].mean() == pytest.approx(1) and found[1] == 0 and found[3] > found[0] > found[2]
    nothing = price_per_sensitivity(torch.ones(4), sensitivity, torch.zeros(4, dtype=torch.bool), 0.05)
    assert torch.equal(nothing, torch.zeros(4))


def test_the_threshold_is_the_proximal_step_in_the_metric_of_the_curvature():
    h, alpha, price = 2.5, 0.8, 0.7
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    loss = h * (x - alpha) ** 2 / 2 + price * x.abs()
    assert float(x[loss.argmin()]) == pytest.approx(float(soft_threshold(torch.tensor(alpha), price / h)), abs=1e-5)


def test_huge_gradients_do_not_overflow():
    sensitivity = observed(torch.zeros(2, dtype=torch.float64), torch.tensor([1e30, 1e-30]), 0.99)
    found = price_per_sensitivity(torch.ones(2), sensitivity, torch.ones(2, dtype=torch.bool), 0.05)
    assert torch.isfinite(sensitivity).all() and torch.isfinite(found).all() and found[1] > found[0]
