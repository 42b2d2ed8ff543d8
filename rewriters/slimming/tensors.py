"""Slices of parameters and buffers, and what replaces these."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def take_indices(tensor: Tensor, dims: Iterable[tuple[int, Tensor]]) -> Tensor:
    """The tensor with only these indices (int64) along these dimensions, in the same memory format; differentiable."""
    sliced = tensor
    for dim, indices in dims:
        sliced = sliced.index_select(dim, indices.to(tensor.device))
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    return sliced.contiguous(memory_format=torch.channels_last) if channels_last else sliced


def unfilled(tensor: Tensor, dims: list[tuple[int, Tensor]]) -> Tensor:
    """As `take_indices`, without values."""
    shape = list(tensor.shape)
    for dim, indices in dims:
        shape[dim] = len(indices)
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)


def like(old: Tensor, sliced: Tensor, learns: bool = True) -> Tensor:
    """`sliced` as the replacement of `old`: a parameter if `old` is one, frozen if that is or if it doesn't learn."""
    return nn.Parameter(sliced, requires_grad=learns and old.requires_grad) if isinstance(old, nn.Parameter) else sliced
