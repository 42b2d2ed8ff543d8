"""Arithmetic on kernel columns: one pass over the weights, in memory order."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

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


def _sizes(shape: Sequence[int], place: int) -> tuple[int, int, int]:
    """Numbers of elements (outer, columns, inner): before this dimension, along it and after it."""
    return prod(shape[:place]), shape[place], prod(shape[place + 1 :])


def _by_memory(tensor: Tensor, order: list[int], dim: int) -> Tensor:
    """The tensor as (outer, columns, inner), `dim` in the middle; no copy if `order` is its memory order."""
    return tensor.permute(order).reshape(_sizes([tensor.shape[d] for d in order], order.index(dim)))


def column_products(gradients: list[Tensor], weights: list[Tensor], dim: int) -> Tensor:
    """<gradient, weight> of each kernel over all dimensions but `dim`: float32 (float64 for such kernels).

    Equal to (gradient * weight).sum over the other dimensions, computed by rows in memory order: one chunk of a large
    kernel at a time, as many small kernels as fill a chunk. That is twice as fast for the 3x3 kernels of a contiguous
    ResNet as the plain form, and takes no memory.

    Args:
        gradients: at least one, of one shape.
        weights: their kernels, of one shape, dtype and memory order.
        dim: the dimension that is kept.

    Returns:
        Shape (kernels, size of `dim`).
    """
    chunk = CHUNK if weights[0].device.type == "cpu" else CUDA_CHUNK
    count = chunk // max(1, weights[0].numel())
    if count < 2 or len(weights) < 2:
        pairs = zip(gradients, weights, strict=True)
        return torch.stack([_large_column_products(gradient, weight, dim, chunk) for gradient, weight in pairs])
    order = _order_in_memory(weights[0])
    if order != sorted(order):
        gradients, weights = [g.permute(order) for g in gradients], [w.permute(order) for w in weights]
    outer, size, inner = _sizes(weights[0].shape, order.index(dim))
    kind = torch.promote_types(weights[0].dtype, torch.float32)
    scratch = weights[0].new_empty((min(count, len(weights)), *weights[0].shape), dtype=kind)
    sums = []
    for start in range(0, len(weights), count):
        part = weights[start : start + count]
        products = torch.stack(gradients[start : start + count], out=scratch[: len(part)])
        torch._foreach_mul_(products.unbind(0), part)
        rows = products.view(len(part), outer, size * inner).sum(1)
        sums.append(rows.view(len(part), size, inner).sum(2) if inner > 1 else rows)
    return torch.cat(sums)


def _large_column_products(gradient: Tensor, weight: Tensor, dim: int, chunk: int) -> Tensor:
    """The column products of one kernel, `chunk` elements at a time."""
    order = _order_in_memory(weight)
    left, right = _by_memory(gradient, order, dim), _by_memory(weight, order, dim)
    outer, size, inner = right.shape
    left, right = left.reshape(outer, size * inner), right.reshape(outer, size * inner)
    kind = torch.promote_types(weight.dtype, torch.float32)
    rows = max(1, chunk // max(1, size * inner))
    sums = (left[:rows].to(kind) * right[:rows]).sum(0)
    for start in range(rows, outer, rows):
        part = slice(start, start + rows)
        sums += (left[part].to(kind) * right[part]).sum(0)
    return sums.view(size, inner).sum(1) if inner > 1 else sums


def scale_columns(weights: list[Tensor], dim: int, factors: Tensor) -> None:
    """Multiply index i of dimension `dim` of each kernel by its factor i, in place.

    Args:
        weights: at least one, of one shape, dtype and memory order.
        dim: the dimension along which factors lie.
        factors: shape (kernels, size of `dim`).
    """
    first = weights[0]
    order = _order_in_memory(first)
    factors = factors.to(first)
    if not first.permute(order).is_contiguous():
        torch._foreach_mul_(weights, [along(factor, dim, first.ndim) for factor in factors.unbind(0)])
        return
    outer, size, inner = _sizes([first.shape[d] for d in order], order.index(dim))
    # One long inner loop instead of many of a kernel's 9 elements.
    factors = factors.repeat_interleave(inner, 1) if inner > 1 else factors
    if first.shape != (outer, size * inner) or order != [0, 1]:
        weights = [weight.permute(order).view(outer, size * inner) for weight in weights]
    torch._foreach_mul_(weights, factors.unbind(0))
