"""Weights for a trial run, put into the live model and taken out again by an `UndoLog`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rewriters.analysis import Analysis
from rewriters.recording import tensor_slots
from rewriters.slimming.plan import like
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
    slots = [slot for slot in tensor_slots(model) if not isinstance(slot[1], torch.jit.ScriptModule)]
    # A ScriptModule's tensors can't be exchanged; what it reads is pinned.
    drawn = _drawn({id(tensor): tensor.detach() for _, _, _, tensor in slots if isinstance(tensor, nn.Parameter)})
    made: dict[int, Tensor] = {}
    for name, module, own_name, tensor in slots:
        if id(tensor) not in made:
            made[id(tensor)] = _trial_value(tensor, drawn.get(id(tensor)), columns.get(name, ()), in_float64)
        if made[id(tensor)] is not tensor:
            undo_log.set_tensor(module, own_name, made[id(tensor)])


def _trial_value(
    tensor: Tensor, drawn: Tensor | None, columns: Iterable[tuple[int, Tensor]], in_float64: bool
) -> Tensor:
    """What stands for a parameter or buffer: the parameter itself if nothing about it changes."""
    value = tensor.detach() if drawn is None else drawn
    if in_float64 and value.is_floating_point():
        value = value.double()
    for dim, is_open in columns:
        along = [len(is_open) if other == dim else 1 for other in range(value.ndim)]
        value = torch.where(is_open.view(along).to(value.device), value, 0)
    if value.data_ptr() != tensor.data_ptr():
        return like(tensor, value)
    return tensor if isinstance(tensor, nn.Parameter) else value.clone()


def _drawn(values: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Other elements for those of the parameters whose own are all equal, by the same keys."""
    equal = {key: value for key, value in values.items() if _all_equal(value)}
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(sum(value.numel() for value in equal.values()), generator=generator, dtype=torch.float64) * 2 - 1
    found = {}
    for (key, value), own in zip(equal.items(), noise.split([value.numel() for value in equal.values()]), strict=True):
        inputs = value[0].numel() if sum(size > 1 for size in value.shape) > 1 else 4
        found[key] = value + (own.view(value.shape) / math.sqrt(inputs)).to(value.device, value.dtype)
    return found


def _all_equal(value: Tensor) -> bool:
    """Whether a tensor has several elements, which are numbers and all equal."""
    if not value.is_floating_point() or value.numel() < 2:
        return False
    flat = value.flatten()
    first, last = flat[:: len(flat) - 1].tolist()
    return first == last and bool((flat == first).all())
