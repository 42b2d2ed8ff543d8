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


def all_finite(values: Tensor) -> Tensor:
    """Whether all values are finite, as a 0-dim bool tensor, in a quarter of the passes that `isfinite` takes."""
    extremes = torch.aminmax(values) if values.numel() else (values,)
    return torch.isfinite(torch.stack(extremes)).all()


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


def column_products(gradients: list[Tensor], weights: list[Tensor], dim: int) -> Tensor:
    """<gradient, weight> of each kernel over all dimensions but `dim`: float32 (float64 for such kernels).

    Equal to (gradient * weight).sum over the other dimensions, computed by rows in memory order, a chunk at a time: of
    a large kernel, or of as many small ones as fill a chunk. That takes no memory, and less time than the plain form.

    Args:
        gradients: at least one, of one shape.
        weights: their kernels, of one shape, dtype and memory order.
        dim: the dimension that is kept.

    Returns:
        Shape (kernels, size of `dim`).
    """
    order = _order_in_memory(weights[0])
    if order != sorted(order):
        gradients, weights = [g.permute(order) for g in gradients], [w.permute(order) for w in weights]
    outer, size, inner = _sizes(weights[0].shape, order.index(dim))
    columns = size * inner
    chunk = CHUNK if weights[0].device.type == "cpu" else CUDA_CHUNK
    count = chunk // max(1, weights[0].numel())
    if count < 2:
        pairs = zip(gradients, weights, strict=True)
        shape = (outer, columns)
        sums = torch.stack([_of_large(g.reshape(shape), w.reshape(shape), chunk) for g, w in pairs])
    else:
        sums = _of_small(gradients, weights, (outer, columns), count)
    return sums.view(len(weights), size, inner).sum(2) if inner > 1 else sums


def _of_small(gradients: list[Tensor], weights: list[Tensor], shape: tuple[int, int], count: int) -> Tensor:
    """The column products of kernels that are matrices of this shape in memory, `count` kernels at a time."""
    kind = torch.promote_types(weights[0].dtype, torch.float32)
    alike = all(gradient.dtype == kind for gradient in gradients)
    scratch = weights[0].new_empty((min(count, len(weights)), *weights[0].shape), dtype=kind)
    each = scratch.unbind(0)
    sums = []
    for start in range(0, len(weights), count):
        part = weights[start : start + count]
        products = scratch[: len(part)]
        if alike and weights[0].dtype == kind:
            products.zero_()
            torch._foreach_addcmul_(each[: len(part)], gradients[start : start + count], part)
        else:
            torch.stack(gradients[start : start + count], out=products)
            torch._foreach_mul_(each[: len(part)], part)
        sums.append(products.view(len(part), *shape).sum(1))
    return torch.cat(sums)


def _of_large(gradient: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """The column products of two matrices."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    rows, columns = weight.shape
    if weight.device.type == "cpu" and gradient.dtype == weight.dtype == kind:
        # What the backward of a layer norm does for its weight, if means are 0 and deviations 1: one pass over both
        # matrices, which writes no products.
        means, deviations = weight.new_zeros(rows, 1), weight.new_ones(rows, 1)
        norm_backward = torch.ops.aten.native_layer_norm_backward
        return norm_backward(gradient, weight, [columns], means, deviations, weight[0], None, [False, True, False])[1]
    each = max(1, chunk // columns)
    parts = zip(gradient.split(each), weight.split(each), strict=True)
    return torch.stack([(left.to(kind) * right).sum(0) for left, right in parts]).sum(0)


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
