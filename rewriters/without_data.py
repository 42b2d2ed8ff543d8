"""What some calls give on tensors without data, told more quickly than PyTorch tells it.

It takes a batch norm or an activation on such tensors apart into a dozen calls, which made most of the time of
recording a forward, or of running it on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What native_batch_norm gives: values, and the batch's mean and inverse deviation in train mode."""
    channels = x.shape[1]
    for tensor in (weight, bias, mean, variance):
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise RuntimeError(f"batch norm of {channels} channels with parameters of shape {tuple(tensor.shape)}")
    saved = channels if training else 0
    return torch.empty_like(x), x.new_empty(saved), x.new_empty(saved)


def _addmm(bias: Tensor, rows: Tensor, columns: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    shape = (rows.shape[0], columns.shape[1])
    if rows.shape[1] != columns.shape[0] or torch.broadcast_shapes(bias.shape, shape) != shape:
        raise RuntimeError(f"addmm of {tuple(bias.shape)}, {tuple(rows.shape)} and {tuple(columns.shape)}")
    return rows.new_empty(shape)


def _activation(x: Tensor, *settings: Any, **options: Any) -> Tensor:
    return torch.empty_like(x)


def _activation_in_place(x: Tensor, *settings: Any, **options: Any) -> Tensor:
    return x


_aten = torch.ops.aten

QUICKER: Mapping[Any, Callable[..., Any]] = {
    _aten.native_batch_norm.default: _batch_norm,
    _aten.addmm.default: _addmm,
    **dict.fromkeys(
        (_aten.elu.default, _aten.gelu.default, _aten.hardsigmoid.default, _aten.hardswish.default,
         _aten.hardtanh.default, _aten.leaky_relu.default, _aten.mish.default, _aten.silu.default), _activation
    ),
    **dict.fromkeys(
        (_aten.elu_.default, _aten.gelu_.default, _aten.hardsigmoid_.default, _aten.hardswish_.default,
         _aten.hardtanh_.default, _aten.leaky_relu_.default, _aten.mish_.default, _aten.silu_.default),
        _activation_in_place
    ),
}  # fmt: skip
"""What to call in the place of these."""


def quicker(op: Any) -> Callable[..., Any]:
    """What to call in the place of an ATen op on tensors without data; the op itself where it is quick enough."""
    return QUICKER.get(op, op)


class WithoutData(TorchDispatchMode):
    """Inside, forwards run on meta tensors the quicker way."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return quicker(func)(*args, **(kwargs or {}))
