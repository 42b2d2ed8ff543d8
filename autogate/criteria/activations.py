"""Criteria that read what flows through the model. They need no labels."""

from __future__ import annotations

import torch
from torch import Tensor

from autogate.criteria.readings import Readings
from autogate.criteria.registry import criterion


@criterion("activation", needs="inputs")
def activation(read: Readings) -> Tensor:
    """Mean absolute activation over batches, positions and the kernels that read it, relative to the group's mean.

    Classes that only kernels computed in the forward read stay. Molchanov et al., "Pruning Convolutional Neural
    Networks for Resource Efficient Inference", section 2.2, has this criterion.
    """
    return read.relative(torch.stack(list(read.activations())).mean(0))
