"""The gate function, and how it sharpens: smooth at first, almost a step at the end.

Guo et al., "GDP: Stabilized Neural Network Pruning via Gates with Differentiable Polarization", section 3.2.
"""

from __future__ import annotations

from torch import Tensor


def gate_value(alpha: Tensor, epsilon: Tensor | float) -> Tensor:
    """The gate g(alpha) = alpha^2 / (alpha^2 + epsilon), equation 2.

    Args:
        alpha: learnable gate parameters, any shape.
        epsilon: positive smoothing constant.

    Returns:
        Gates in [0, 1], of alpha's shape: exactly zero where alpha is zero, close to one far from it.
    """
    square = alpha * alpha
    return square / (square + epsilon)


def gate_slope(alpha: Tensor, epsilon: Tensor | float) -> Tensor:
    """The gate's derivative 2 alpha epsilon / (alpha^2 + epsilon)^2, equation 4."""
    return 2 * alpha * epsilon / (alpha * alpha + epsilon) ** 2


def epsilon_at(step: int, steps: float, start: float, end: float) -> float:
    """Epsilon after `step` of the `steps` that it falls over: an exponential decay, as in section 4.1.

    The paper multiplies epsilon by a constant once an epoch, until the run ends. Here the same curve is followed step
    by step, so that it doesn't depend on the length of an epoch, and it ends when the targets are to be met: live gates
    are then open, and learn as in a plain network. After that epsilon stays at `end`.

    Args:
        step: steps taken.
        steps: steps that epsilon falls over.
        start, end: epsilon at both ends.
    """
    return start * (end / start) ** min(step / steps, 1.0)
