"""Gated sides, and stacks of those that are alike.

A call of PyTorch takes a few microseconds, as long as the arithmetic of ten thousand elements. A network of many small
kernels has many of one shape, so one call takes a stack of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autogate.gating.sharding import layout, local


class GatedSide(NamedTuple):
    """A gated side: its place among all, its dimension, the kernel, its columns in this process (None: all)."""

    place: int
    dim: int
    weight: nn.Parameter
    here: Tensor | None


class Stack(NamedTuple):
    """Sides along one dimension of kernels of one shape, dtype, memory order and sharding.

    Attributes:
        sides: these sides.
        positions: int64, shape (sides, columns): where the columns in this process are in a vector along all sides.
    """

    sides: tuple[GatedSide, ...]
    positions: Tensor

    @property
    def dim(self) -> int:
        """The dimension of the kernels along which the columns lie."""
        return self.sides[0].dim

    @property
    def layout(self) -> Any:
        """Where the kernels' parts are, as `sharding.layout`."""
        return layout(self.sides[0].weight)

    def only(self, places: Iterable[int]) -> Stack | None:
        """The stack of those sides that have these places, None if there are none."""
        wanted = set(places)
        rows = [row for row, side in enumerate(self.sides) if side.place in wanted]
        if len(rows) == len(self.sides):
            return self
        positions = self.positions[torch.tensor(rows, dtype=torch.int64, device=self.positions.device)]
        return Stack(tuple(self.sides[row] for row in rows), positions) if rows else None


def forms(sides: Iterable[GatedSide]) -> list[tuple[Any, ...]]:
    """What `kernel.data = ...` can change of that by which sides are stacked."""
    return [(side.weight.dtype, side.weight.stride()) for side in sides]


def stacked(sides: Sequence[GatedSide], begins: Sequence[int], device: torch.device) -> list[Stack]:
    """All sides, in stacks.

    Args:
        sides: the gated sides.
        begins: by place, where a side begins in a vector along all sides.
        device: where values along sides are.
    """
    alike: dict[Any, list[GatedSide]] = {}
    for side in sides:
        weight = local(side.weight)
        form = weight.device, weight.dtype, weight.shape, weight.stride(), side.dim, layout(side.weight)
        alike.setdefault(form, []).append(side)
    stacks = []
    for group in alike.values():
        columns = torch.arange(local(group[0].weight).shape[group[0].dim])
        rows = [begins[side.place] + (columns if side.here is None else side.here) for side in group]
        stacks.append(Stack(tuple(group), torch.stack(rows).to(device)))
    return stacks
