"""The proximal part of a gate's step: how a price on channels takes alpha to exact zero.

Guo et al., "GDP", section 3.4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def soft_threshold(alpha: Tensor, beta: Tensor | float) -> Tensor:
    """The minimiser of (x - alpha)^2 / 2 + beta |x|, equation 9.

    Args:
        alpha: any shape.
        beta: nonnegative, of a shape that broadcasts to alpha's.

    Returns:
        alpha moved towards zero by beta; exactly zero where |alpha| <= beta.
    """
    return torch.sign(alpha) * torch.clamp(alpha.abs() - beta, min=0)


def shrinkage(relative_price: Tensor, movement: float, bound: float) -> Tensor:
    """Equation 9's beta for every class: eta * lambda * price, bounded.

    Args:
        relative_price: price of each class over the mean price of live classes, shape (classes,).
        movement: eta * lambda * mean price, the distance that a class of mean price moves in this step.
        bound: longest distance that a class moves, as long as `movement` is below it. Without it an expensive class
            would jump from an open gate to a closed one; section 4.1 has this as "we smooth the shrinkage of alpha when
            necessary".

    Returns:
        Distances towards zero, shape (classes,).
    """
    return torch.clamp(movement * relative_price, max=max(bound, movement))


def alternating_relaxation(
    target: Tensor, price: Callable[[Tensor], Tensor], weight: float, start: Tensor, iterations: int = 1
) -> Tensor:
    """Algorithm 1: minimise |x - target|^2 / 2 + weight * R(|x_1|_0, ..., |x_L|_0) for a bilinear R.

    In each round every layer's l0 norm is relaxed to an l1 norm, and the others count as constants. R is bilinear, so
    these constants are R's derivative, the price. The training step is one round (N = 1, as in all of the paper's
    experiments) that starts from the live classes.

    Args:
        target: alpha after the gradient step, all layers in one vector, shape (classes,).
        price: R's derivative by each entry being nonzero, from the bool vector of nonzero entries.
        weight: eta * lambda.
        start: alpha to begin with, shape (classes,).
        iterations: N of algorithm 1.

    Returns:
        alpha after N rounds, shape (classes,).
    """
    alpha = start
    for _ in range(iterations):
        alpha = soft_threshold(target, weight * price(alpha != 0).to(target.dtype))
    return alpha


def clipped_threshold(norm: Tensor, beta: Tensor | float, delta: Tensor | float) -> Tensor:
    """The minimiser of (x - norm)^2 / 2 + beta min(x, delta) over x >= 0: the proximal step of a clipped norm.

    Yang et al., "Non-uniform DNN Structured Subnets Sampling for Dynamic Inference", equation 3. With an infinite delta
    it is the group Lasso's. Below delta a norm falls by beta. Above delta it stays, unless the way down is shorter than
    what the penalty saves, which needs a beta that is large beside the norm.

    Args:
        norm: nonnegative, any shape.
        beta, delta: nonnegative, of shapes that broadcast to the norm's.
    """
    shrunk = torch.minimum((norm - beta).clamp(min=0), torch.as_tensor(delta, dtype=norm.dtype, device=norm.device))
    stays = (norm >= delta) & (beta * delta <= (norm - shrunk).square() / 2 + beta * shrunk)
    return torch.where(stays, norm, shrunk)
