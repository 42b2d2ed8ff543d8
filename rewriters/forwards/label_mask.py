"""Which labels stay, and what that leaves of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriters.labelling import Labelled, varying


@dataclass(frozen=True)
class LabelMask:
    """Which labels stay.

    Attributes:
        stays: bool, of shape (labels,).
    """

    stays: Tensor

    def kept(self, value: Labelled, dim: int) -> Tensor:
        """Which indices of a tensor along a dimension stay, bool of shape (size,)."""
        layer = value.layer(dim % value.ndim)
        if layer is None:
            return torch.ones(value.shape[dim], dtype=torch.bool)
        stays = self.stays[layer]
        others = [d for d in varying(layer) if d != dim % value.ndim]
        along = stays.amax(others) if others else stays
        return along.flatten()

    def shape(self, value: Labelled) -> tuple[int, ...]:
        """The shape of what is left of a tensor."""
        sizes = list(value.shape)
        for dim in labelled_dims(value):
            sizes[dim] = int(self.kept(value, dim).sum())
        return tuple(sizes)

    def slim(self, tensor: Tensor, value: Labelled, first: int = 0) -> Tensor:
        """The tensor without the indices that are removed; its dimensions are those of `value` from `first` on.

        Expanded dimensions stay expanded, so they take no memory.
        """
        expanded = [dim for dim in range(tensor.ndim) if tensor.stride(dim) == 0 and tensor.shape[dim]]
        sizes = list(tensor.shape)
        for dim in expanded:
            tensor = tensor.narrow(dim, 0, 1)
        for dim in range(tensor.ndim):
            kept = self.kept(value, first + dim)
            if kept.all():
                continue
            sizes[dim] = int(kept.sum())
            if dim not in expanded:
                tensor = tensor.index_select(dim, kept.nonzero().flatten().to(tensor.device))
        return tensor.expand(sizes) if expanded else tensor


def labelled_dims(value: Labelled) -> set[int]:
    """The dimensions along which a tensor has labels; nothing is removed along the others."""
    return {dim for layer in value.layers for dim in varying(layer)}


class SlimShapes:
    """What a mask leaves of the tensors in a traced graph.

    Args:
        known: labels of these tensors, by id.
        mask: which labels stay.
    """

    def __init__(self, known: Mapping[int, Labelled], mask: LabelMask):
        self.mask = mask
        self._known = known
        self._shapes: dict[int, tuple[int, ...]] = {}

    def labels(self, tensor: Tensor) -> Labelled:
        return self._known.get(id(tensor)) or Labelled.unknown(tensor)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of what is left of a tensor."""
        if id(tensor) not in self._shapes:
            self._shapes[id(tensor)] = self.mask.shape(self.labels(tensor))
        return self._shapes[id(tensor)]

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether nothing of a tensor is removed."""
        return self.shape(tensor) == tuple(tensor.shape)

    def kept(self, tensor: Tensor, dim: int) -> Tensor:
        """Which indices along a dimension stay, bool of shape (size,)."""
        return self.mask.kept(self.labels(tensor), dim)
