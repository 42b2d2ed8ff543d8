"""Criteria that read the loss's gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from autogate.criteria.readings import Readings
from autogate.criteria.registry import criterion


@criterion("taylor", needs="loss")
def taylor(read: Readings) -> Tensor:
    """Mean over batches of |sum of gradient times weight|: how much the loss changes, to first order.

    Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", section 2.2, with a
    gate in the place of the activation.
    """
    return torch.stack([products.abs() for products in read.gradients()]).mean(0)


@criterion("fisher", needs="loss")
def fisher(read: Readings) -> Tensor:
    """Mean over batches of (sum of gradient times weight) squared: the curvature's part, to second order.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", equation 8, over all weights of a class.
    """
    return torch.stack([products.square() for products in read.gradients()]).mean(0)
