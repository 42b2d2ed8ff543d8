"""Take layouts from real results where fake tensors have others.

Fake tensors sometimes have another memory order than a call's real result, and then a later `view` fails that would be
fine; or a call itself has a fault in its fake version. If a recording fails, it is tried once more with this: each call
runs for real on random numbers of its arguments' shapes, and gives its result's layout.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_map_only

from rewriters.recording.meta_kernels import run_on_fakes
from rewriters.recording.pytrees import tensors_of

ASKS_FOR_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""Errors of calls whose result depends on values: no layout helps."""

MOST_BYTES = 2**28
"""A call whose arguments take more memory isn't run for real."""


def may_be_a_fault_of_fakes(error: Exception) -> bool:
    """Whether another layout might have helped."""
    return isinstance(error, RuntimeError) and not isinstance(error, ASKS_FOR_VALUES)


def run_with_real_layout(mode: FakeTensorMode, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an ATen call on fake tensors; its result has the layout that a real result has.

    Calls that write to their arguments, return views of them or take much memory are run on fake tensors alone.
    """
    try:
        out = run_on_fakes(mode, op, args, kwargs)
    except Exception as error:
        if not may_be_a_fault_of_fakes(error) or not _is_plain(op):
            raise
        out = None
    given = tensors_of((args, dict(kwargs)))
    known = out is None or all(isinstance(tensor, FakeTensor) for tensor in tensors_of(out))
    known &= all(tensor.layout is torch.strided for tensor in given)
    if not _is_plain(op) or not known or sum(tensor.nbytes for tensor in given) > MOST_BYTES:
        return out if out is not None else run_on_fakes(mode, op, args, kwargs)
    try:
        with unset_fake_temporarily():
            real = op(*tree_map_only(Tensor, _random, args), **tree_map_only(Tensor, _random, dict(kwargs)))
    except Exception:  # what random numbers lead to: an index out of range, a matrix without an inverse
        return out if out is not None else run_on_fakes(mode, op, args, kwargs)
    shapes = [(tensor.shape, tensor.stride()) for tensor in tensors_of(real)]
    if out is not None and shapes == [(tensor.shape, tensor.stride()) for tensor in tensors_of(out)]:
        return out
    return tree_map_only(Tensor, lambda tensor: _as_fake(mode, tensor), real)


@functools.cache
def _is_plain(op: Any) -> bool:
    """Whether a call makes new tensors and changes none."""
    return not op._schema.is_mutable and not any(one.alias_info is not None for one in op._schema.returns)


def _random(tensor: Tensor) -> Tensor:
    """A real tensor like this one; indices are zero."""
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).zero_()
    return made.uniform_(0.5, 1.5) if made.is_floating_point() else made


def _as_fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, meta, tensor.device)
