"""Criteria that read weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

from autogate.criteria.readings import Readings
from autogate.criteria.registry import criterion
from rewriters import AutogateError


@criterion("l1")
def l1(read: Readings) -> Tensor:
    """Sum of absolute weights, relative to the group's mean.

    Li et al., "Pruning Filters for Efficient ConvNets", over all kernels and norm scales that a class lies
    on (Fang et al., "DepGraph", section 3.3).
    """
    return read.relative(read.total([*read.kernels(), *read.scales()], lambda rows: rows.abs().sum(1)))


@criterion("l2")
def l2(read: Readings) -> Tensor:
    """Sum of squared weights, relative to the group's mean (DepGraph, section 3.3)."""
    return read.relative(_squares(read))


@criterion("lamp")
def lamp(read: Readings) -> Tensor:
    """Squared weights over those of all classes of the group that are no smaller: LAMP.

    Lee et al., "Layer-Adaptive Sparsity for the Magnitude-based Pruning", for classes instead of weights.
    """
    squares, scores = _squares(read), torch.zeros(read.size, dtype=torch.float64)
    live = read.bank.live.cpu()
    for classes in read.groups:
        alive = classes[live[classes]]
        falling, order = squares[alive].sort(descending=True)
        scores[alive[order]] = falling / falling.cumsum(0).clamp(min=torch.finfo(falling.dtype).tiny)
    return scores


@criterion("bn_scale")
def bn_scale(read: Readings) -> Tensor:
    """Sum of the absolute scales of batch norms, relative to the group's mean. Classes without a batch norm stay.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", section 3.
    """
    scales = read.batch_norm_scales()
    if not scales:
        raise AutogateError(
            "no channel that can be removed has a batch norm with a scale.",
            where="close",
            remedy="Use another criterion, 'l1' for instance.",
        )
    held = read.total(scales, lambda rows: torch.ones_like(rows[:, 0]))
    return torch.where(held > 0, read.relative(read.total(scales, lambda rows: rows.abs().sum(1))), torch.inf)


@criterion("fpgm")
def fpgm(read: Readings) -> Tensor:
    """Sum of the distances to the other channels of each kernel, relative to the group's mean.

    The channel nearest to the geometric median is the one that others can stand in for: He et al., "Filter Pruning via
    Geometric Median for Deep Convolutional Neural Networks Acceleration".
    """
    return read.relative(read.total(read.kernels(), lambda rows: torch.cdist(rows[None], rows[None])[0].sum(1)))


def _squares(read: Readings) -> Tensor:
    return read.total([*read.kernels(), *read.scales()], lambda rows: rows.square().sum(1))
