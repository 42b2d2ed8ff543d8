"""Criteria that read nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from autogate.criteria.readings import Readings
from autogate.criteria.registry import criterion


@criterion("random")
def random(read: Readings) -> Tensor:
    """Random numbers, drawn from the seed given to `torch.manual_seed`: what a criterion has to beat."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    return torch.rand(read.size, generator=generator, dtype=torch.float64)
