"""Columns of nearly closed gates, which follow the optimizer only in part (see `GDP.let_through`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autogate.gating.columns import along
from autogate.gating.kernels import GatedKernels
from autogate.gating.sharding import local
from autogate.gating.sides import GatedSide


@dataclass(frozen=True)
class HeldBack:
    """Columns as they were before an optimizer's step, and the part of the step that takes effect."""

    weight: nn.Parameter
    dim: int
    index: Tensor
    before: Tensor
    part: Tensor

    def release(self) -> None:
        """After the step: let only the part of the columns' change take effect."""
        weight = local(self.weight)
        after = weight.index_select(self.dim, self.index)
        part = along(self.part, self.dim, weight.ndim)
        weight.index_copy_(self.dim, self.index, torch.lerp(self.before, after, part))


def hold_back(
    gated: GatedKernels, chosen: Tensor, part: Tensor, sides: list[GatedSide], kernels: dict[int, Tensor]
) -> tuple[HeldBack, ...]:
    """Note the columns of the chosen classes, so that `release` lets only a part of their change take effect.

    Args:
        gated: the gated kernels.
        chosen: bool, shape (classes,).
        part: in [0, 1], shape (classes,).
        sides: the gated sides.
        kernels: by place, the kernels as they were before; empty if they are as they are now.
    """
    if not chosen.any():
        return ()
    part = gated.spread(part, 1.0)
    held = []
    for side, index in gated.columns(chosen, sides):
        before = kernels[side.place] if kernels else local(side.weight)
        through = gated.on_side(part, side)[index.to(part.device)].to(before)
        index = index.to(before.device)
        held.append(HeldBack(side.weight, side.dim, index, before.index_select(side.dim, index), through))
    return tuple(held)
