"""How much the loss depends on each gate, and prices weighed by it.

The proximal step of Guo et al., "GDP" (section 3.4, equation 9), moves all classes of one price towards zero by the
same distance. Gradients have to hold those that are needed. In the paper's 350 epochs they do. In the few epochs that
people spend, the gradient of an open gate is noise around zero, and prices alone decide what closes.

But the size of that noise is informative. To second order, closing gate i costs h_i g_i^2 / 2, and the mean of the
squared gradients estimates the curvature h_i (the empirical Fisher information; Molchanov et al., "Importance
Estimation for Neural Network Pruning", equation 8, rank channels by it). So the proximal step is taken in the metric of
h,

    argmin over x of h (x - alpha)^2 / 2 + eta lambda c |x|,

which is equation 9 with the price c / h instead of c. Under a steady lambda, alphas reach zero in the order of h / c:
first those whose death costs the least loss for what it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def observed(sensitivity: Tensor, gradient: Tensor, decay: float) -> Tensor:
    """The running mean of squared gradients after one more step.

    It starts at zero, without bias correction: only the ratios between classes are used.

    Args:
        sensitivity: float64, shape (classes,).
        gradient: dL/dg of each class, shape (classes,).
        decay: weight of the mean so far.
    """
    return torch.lerp(gradient.to(sensitivity).square(), sensitivity, decay)


def price_per_sensitivity(price: Tensor, sensitivity: Tensor, live: Tensor, damping: float) -> Tensor:
    """Price of each class divided by its sensitivity, relative to the mean of live classes.

    Args:
        price: nonnegative, shape (classes,).
        sensitivity: running means of squared gradients, in any unit, shape (classes,). Where they are all zero
            the price alone counts.
        live: bool, shape (classes,).
        damping: added to curvatures, which are relative to their mean.

    Returns:
        Of the price's type, shape (classes,).
    """
    count = live.sum().clamp(min=1)
    curvature = torch.where(live, sensitivity, 0.0)
    curvature = curvature / (curvature.sum() / count).clamp(min=torch.finfo(curvature.dtype).tiny)
    weighed = torch.where(live, price / (curvature + damping), 0.0)
    return (weighed / (weighed.sum() / count).clamp(min=torch.finfo(curvature.dtype).tiny)).to(price.dtype)
