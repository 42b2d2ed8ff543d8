"""Sharded kernels, of which each process holds a part: the DTensors of FSDP2 (`torch.distributed.fsdp.fully_shard`).

A DTensor is mostly cut along dimension 0. To scale or zero columns, a process needs only its own part. Sums over
columns are linear: each process sums its part, and one all-reduce of a vector with one entry a class makes the gradient
the same on all. A plain tensor is the case where this process has all columns and nothing is added.

`torch.distributed.tensor` takes a second to import. Who has a DTensor has imported it, so it is looked up among the
modules that are loaded.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from rewriters.recording import modules_of, tensor_slots


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of the tensor."""
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def _is_managed(module: nn.Module) -> bool:
    # The attribute is for modules within one that was sharded: FSDP leaves it there for Dynamo to see.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return vars(module).get("_is_fsdp_managed_module", False) or isinstance(module, getattr(fsdp, "FSDPModule", ()))


def has_shards(model: nn.Module) -> bool:
    """Whether FSDP2 manages a part of the model, whether or not its parameters are gathered now."""
    if sys.modules.keys().isdisjoint(("torch.distributed.fsdp", "torch.distributed.tensor")):
        return False
    return any(map(_is_managed, modules_of(model))) or any(is_sharded(tensor) for *_, tensor in tensor_slots(model))


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor in this process, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def layout(tensor: Tensor) -> Any:
    """Where the tensor's parts are, None if all is here. Tensors of one layout can be summed together."""
    return (tensor.device_mesh, tuple(tensor.placements)) if is_sharded(tensor) else None  # type: ignore[attr-defined]


def columns_here(tensor: Any, dim: int) -> Tensor | None:
    """The indices along `dim` in this process, int64 on the CPU; None for all of them."""
    if not is_sharded(tensor) or all(_shards_dim(placement) != dim for placement in tensor.placements):
        return None
    shape = [1] * tensor.ndim
    shape[dim] = -1
    index = torch.arange(tensor.shape[dim], device=tensor.device_mesh.device_type).view(shape)
    others_whole = [p if _shards_dim(p) == dim else _tensors().Replicate() for p in tensor.placements]
    return _part(index, tensor.device_mesh, others_whole).flatten().cpu()


def part_like(whole: Tensor, tensor: Any) -> Tensor:
    """The part of `whole`, a plain tensor of the full shape of `tensor`, that belongs to this process."""
    if not is_sharded(tensor):
        return whole
    return _part(whole, tensor.device_mesh, tensor.placements)


def total(values: Tensor, where: Any) -> Tensor:
    """The sum over processes of what each found on its part of tensors of layout `where`.

    This is a collective: every process that holds a part must call it.
    """
    if where is None:
        return values
    mesh, placements = where
    apart = [
        _tensors().Replicate() if _shards_dim(placement) is None else _tensors().Partial() for placement in placements
    ]
    return _tensors().DTensor.from_local(values, mesh, apart, run_check=False).full_tensor()


def _tensors() -> Any:
    """`torch.distributed.tensor`, for a caller who has a DTensor."""
    return sys.modules["torch.distributed.tensor"]


def _part(whole: Tensor, mesh: Any, placements: Any) -> Tensor:
    everywhere = _tensors().DTensor.from_local(whole, mesh, [_tensors().Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements).to_local()


def _shards_dim(placement: Any) -> int | None:
    """The dimension that a placement shards, None if it doesn't."""
    return getattr(placement, "dim", None)
