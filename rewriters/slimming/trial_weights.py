"""Weights for a trial run, put into the live model and taken out again by an `UndoLog`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rewriters.analysis import Analysis
from rewriters.slimming.tensors import like, tensor_slots
from rewriters.undo_log import UndoLog


def put_trial_weights(
    model: nn.Module, analysis: Analysis, live: Tensor, undo_log: UndoLog, in_float64: bool = False
) -> None:
    """Make a model what it would be if the classes outside of `live` were dead; shared tensors stay shared.

    Kernels that sum over dead classes have zeros there. Parameters whose elements are all equal are drawn: a norm's
    weights that begin at zero, or a layer scale at 1e-6, hide what the branch before them computes. Buffers are copies,
    which a forward may write to.

    Args:
        model: changed in place.
        analysis: of that model.
        live: the classes that stay, bool of shape (classes,).
        undo_log: notes every change.
        in_float64: whether all that is floating-point becomes float64.
    """
    columns = analysis.channel_map.open_columns(live)
    generator = torch.Generator().manual_seed(0)
    made: dict[int, Tensor] = {}
    for name, module, own_name, tensor in list(tensor_slots(model)):
        if isinstance(module, torch.jit.ScriptModule):
            continue  # its tensors can't be exchanged; what it reads is pinned
        if id(tensor) not in made:
            value = tensor.detach()
            if isinstance(tensor, nn.Parameter):
                value = _drawn(value, generator)
            if in_float64 and value.is_floating_point():
                value = value.double()
            if value.data_ptr() == tensor.data_ptr() and (name in columns or not isinstance(tensor, nn.Parameter)):
                value = value.clone()
            for dim, is_open in columns.get(name, ()):
                value.index_fill_(dim, (~is_open).nonzero().flatten().to(value.device), 0)
            made[id(tensor)] = tensor if value.data_ptr() == tensor.data_ptr() else like(tensor, value)
        if made[id(tensor)] is not tensor:
            undo_log.set_tensor(module, own_name, made[id(tensor)])


def _drawn(value: Tensor, generator: torch.Generator) -> Tensor:
    """A parameter's value, with other elements if all of its own are equal."""
    if not value.is_floating_point() or value.numel() < 2:
        return value
    flat = value.flatten()
    if flat[0] != flat[-1] or not (flat == flat[0]).all():
        return value
    inputs = value[0].numel() if sum(size > 1 for size in value.shape) > 1 else 4
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return value + (noise / math.sqrt(inputs)).to(value.device, value.dtype)
