"""The penalty's gradient, against autograd of the penalty written out."""

import torch
from torch import Tensor

from autogate.saliency.penalty import penalised

SCORES = torch.tensor([[1.5, -0.5, 0.2], [-2.0, 0.0, -0.1]])
LOSS = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.7, -0.4]])


def gradient(push: float, published: bool, level: Tensor | None = None) -> Tensor:
    scores = SCORES.clone().requires_grad_()
    through = penalised(scores, torch.tensor(push), torch.zeros(()) if level is None else level, published)
    assert torch.equal(through, scores)
    (through * LOSS).sum().backward()
    return scores.grad


def test_published_it_is_that_of_equation_9():
    lam, channels = 0.01, 30
    for sign in (1, -1):
        scores = SCORES.clone().requires_grad_()
        penalty = sign * lam / channels * scores.abs().sum(1).mean()  # the loss is a mean over images, and so is this
        ((scores * LOSS).sum() + penalty).backward()
        assert torch.allclose(gradient(sign * lam / channels, True), scores.grad)


def test_steered_it_is_that_of_the_scores_that_scale_an_output():
    scores = SCORES.clone().requires_grad_()
    ((scores * LOSS).sum() + 0.2 * scores.relu().sum(1).mean()).backward()
    assert torch.allclose(gradient(0.2, False), scores.grad)


def test_nothing_is_added_without_a_push():
    assert torch.equal(gradient(0.0, True), LOSS)
    assert torch.equal(gradient(0.0, False), LOSS)


def test_the_level_is_the_running_size_of_the_channels_gradients():
    level = torch.zeros(())
    gradient(5.0, False, level)
    size = LOSS.sum(0).square().mean().sqrt()
    assert torch.allclose(level, size)  # without the penalty's own part
    level.fill_(1.0)
    gradient(5.0, False, level)
    assert torch.allclose(level, 0.95 + 0.05 * size)


def test_an_overflow_leaves_the_level():
    level = torch.ones(())
    scores = SCORES.clone().requires_grad_()
    (penalised(scores, torch.zeros(()), level, False) * torch.inf).sum().backward()
    assert level == 1
