"""Ridge regression with its penalty on the change, against plain least squares."""

from __future__ import annotations

import pytest
import torch

from autogate.compensation.prediction import PENALTIES, predict

KERNEL, FEW = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([[1.0, 2.0, -1.0, 3.0]])
PLAIN = torch.eye(4)[:3]

kernels = pytest.mark.parametrize("kernel", [KERNEL, FEW], ids=["more outputs than channels", "fewer"])


def rows(count: int, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three channels, and a fourth that they determine up to noise."""
    draw = torch.Generator().manual_seed(0)
    kept = torch.randn(count, 3, generator=draw) + 1
    fourth = kept @ torch.tensor([2.0, -1.0, 0.5]) + 5 + noise * torch.randn(count, generator=draw)
    return kept, torch.cat([kept, fourth[:, None]], 1)


@kernels
def test_with_many_rows_it_is_the_least_squares_solution(kernel):
    kept, wanted = rows(4000, noise=0.1)
    found = predict(kept, wanted, PLAIN, kernel, constants=True)
    with_ones = torch.cat([kept, torch.ones(len(kept), 1)], 1)
    least_squares = torch.linalg.lstsq(with_ones, wanted @ kernel.T).solution
    assert torch.allclose(found.taken, least_squares[:3], atol=2e-2)
    assert torch.allclose(found.constant, least_squares[3], atol=5e-2)


@kernels
def test_the_penalty_is_on_the_change_and_not_on_the_weights(kernel):
    """By hand: (A + p I) (taken - plain) = B - A plain, for one of the penalties."""
    kept, wanted = rows(24, noise=1.0)
    found = predict(kept, wanted, PLAIN, kernel, constants=False)
    gram, products = kept.T @ kept / 24, kept.T @ (wanted - kept @ PLAIN) / 24
    by_hand = [
        PLAIN + torch.linalg.solve(gram + penalty * gram.diagonal().mean() * torch.eye(3), products)
        for penalty in PENALTIES
    ]
    assert any(torch.allclose(found.taken, one @ kernel.T, atol=1e-4) for one in by_hand)
    assert not torch.allclose(by_hand[0], by_hand[-1], atol=0.1)


def test_without_a_constant_the_prediction_goes_through_zero():
    kept, wanted = rows(1000)
    found = predict(kept, wanted, PLAIN, KERNEL, constants=False)
    assert not found.constant.any()
    assert torch.allclose(found.taken, torch.linalg.lstsq(kept, wanted @ KERNEL.T).solution, atol=0.2)


def test_channels_that_say_nothing_of_each_other_stay_as_they_are():
    """As many channels as rows: plain least squares fits the rows exactly, and is wrong on others."""
    draw = torch.Generator().manual_seed(0)
    kept, lost = torch.randn(60, 45, generator=draw), torch.randn(60, 15, generator=draw)
    found = predict(kept, torch.cat([kept, lost], 1), torch.eye(60)[:45], torch.eye(60), constants=True)
    taken = torch.eye(60)[:45] if found is None else found.taken
    assert (taken - torch.eye(60)[:45]).norm() < 1


def test_where_nothing_is_left_the_mean_is_given_back():
    wanted = torch.randn(100, 4) + 3
    found = predict(wanted[:, :0], wanted, torch.zeros(0, 4), KERNEL, constants=True)
    assert torch.allclose(found.constant, wanted.mean(0) @ KERNEL.T, atol=1e-4)


def test_a_constant_channel_needs_no_other():
    kept = torch.ones(100, 3)
    wanted = torch.cat([kept, torch.full((100, 1), 7.0)], 1)
    found = predict(kept, wanted, PLAIN, KERNEL, constants=True)
    assert torch.allclose(found.of(kept), wanted @ KERNEL.T, atol=1e-4)
