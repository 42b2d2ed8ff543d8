"""Arithmetic on kernel columns: one pass over the weights, in memory order."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**18
"""Elements of a kernel per chunk on a CPU: the product of gradient and weight stays in its cache and takes little
memory."""

CUDA_CHUNK = 2**23
"""The same on an accelerator, where chunks save memory and each costs a kernel launch."""


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """`values` shaped to broadcast along dimension `dim` of a tensor of `ndim` dimensions."""
    shape = [1] * ndim
    shape[dim] = -1
    return values.view(shape)


def segment_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum of the values of each index, shape (size,), added in the same order in every run.

    On CUDA, index_add adds atomically in any order, so processes that must agree on the gates would not. index_put
    sorts first.
    """
    zeros = values.new_zeros(size)
    if values.is_cuda:
        return zeros.index_put_((index,), values, accumulate=True)
    return zeros.index_add_(0, index, values)


def _order_in_memory(weight: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory: (0, 2, 3, 1) for a channels_last kernel."""
    strides = weight.stride()
    return sorted(range(weight.ndim), key=lambda dim: -strides[dim])


def _by_memory(tensor: Tensor, order: list[int], dim: int) -> Tensor:
    """The tensor as (outer, columns, inner), `dim` in the middle; no copy if `order` is its memory order."""
    place = order.index(dim)
    shape = [tensor.shape[d] for d in order]
    outer, inner = 1, 1
    for length in shape[:place]:
        outer *= length
    for length in shape[place + 1 :]:
        inner *= length
    return tensor.permute(order).reshape(outer, shape[place], inner)


def column_products(gradient: Tensor, weight: Tensor, dim: int) -> Tensor:
    """<gradient, weight> over all dimensions but `dim`: float32 (float64 for such kernels), shape (size,).

    Equal to (gradient * weight).sum over the other dimensions, computed by rows in memory order, one chunk at a time.
    That is twice as fast for the 3x3 kernels of a contiguous ResNet, and takes no memory.
    """
    order = _order_in_memory(weight)
    left, right = _by_memory(gradient, order, dim), _by_memory(weight, order, dim)
    outer, size, inner = right.shape
    left, right = left.reshape(outer, size * inner), right.reshape(outer, size * inner)
    kind = torch.promote_types(weight.dtype, torch.float32)
    chunk = CHUNK if weight.device.type == "cpu" else CUDA_CHUNK
    rows = max(1, chunk // max(1, size * inner))
    sums = (left[:rows].to(kind) * right[:rows]).sum(0)
    for start in range(rows, outer, rows):
        part = slice(start, start + rows)
        sums += (left[part].to(kind) * right[part]).sum(0)
    return sums.view(size, inner).sum(1) if inner > 1 else sums


def scale_columns(weight: Tensor, dim: int, factor: Tensor) -> None:
    """Multiply index i of dimension `dim` by factor[i], in place."""
    order = _order_in_memory(weight)
    permuted = weight.permute(order)
    factor = factor.to(weight)
    if not permuted.is_contiguous():
        weight.mul_(along(factor, dim, weight.ndim))
        return
    outer, size, inner = (rows := _by_memory(weight, order, dim)).shape
    # One long inner loop instead of many of a kernel's 9 elements.
    rows.view(outer, size * inner).mul_(factor.repeat_interleave(inner) if inner > 1 else factor)
