"""Gated sides, and stacks of those that are alike.

A call of PyTorch takes a few microseconds, as long as the arithmetic of ten thousand elements. A network of many small
kernels has many of one shape, so one call takes a stack of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autogate.gating.sharding import is_sharded, layout, local


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
        kernels: of each side.
        positions: int64, shape (sides, columns): where the columns in this process are in a vector along all sides.
        labels: int64, shape (sides, columns): their classes.
    """

    sides: tuple[GatedSide, ...]
    kernels: list[nn.Parameter]
    positions: Tensor
    labels: Tensor

    @property
    def dim(self) -> int:
        """The dimension of the kernels along which the columns lie."""
        return self.sides[0].dim

    @property
    def layout(self) -> Any:
        """Where the kernels' parts are, as `sharding.layout`."""
        return layout(self.kernels[0])

    def here(self) -> list[Tensor]:
        """The parts of the kernels in this process."""
        return [*map(local, self.kernels)] if is_sharded(self.kernels[0]) else [*self.kernels]

    def learning(self) -> Stack | None:
        """The stack of those sides whose kernels have a gradient, None if there are none."""
        return self.only([kernel.grad is not None for kernel in self.kernels])

    def gradients(self) -> list[Tensor]:
        """The parts of the gradients in this process, of kernels that all have one."""
        gradients = [kernel.grad for kernel in self.kernels if kernel.grad is not None]
        return [*map(local, gradients)] if is_sharded(self.kernels[0]) else gradients

    def only(self, chosen: Sequence[bool]) -> Stack | None:
        """The stack of the chosen sides, None if there are none."""
        if all(chosen):
            return self
        rows = [row for row, choice in enumerate(chosen) if choice]
        index = torch.tensor(rows, dtype=torch.int64, device=self.positions.device)
        kernels = [self.kernels[row] for row in rows]
        sides = tuple(self.sides[row] for row in rows)
        return Stack(sides, kernels, self.positions[index], self.labels[index]) if rows else None


def forms(kernels: Iterable[nn.Parameter]) -> list[Any]:
    """What `kernel.data = ...` can change of that by which sides are stacked."""
    return [form for kernel in kernels for form in (kernel.dtype, kernel.stride())]


def stacked(sides: Sequence[GatedSide], begins: Sequence[int], labels: Tensor) -> list[Stack]:
    """All sides, in stacks.

    Args:
        sides: the gated sides.
        begins: by place, where a side begins in a vector along all sides.
        labels: the class of each column, along all sides.
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
        positions = torch.stack(rows).to(labels.device)
        stacks.append(Stack(tuple(group), [side.weight for side in group], positions, labels[positions]))
    return stacks
