"""Signs that too much has died: layers with a channel or none, outputs that are the same for all inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autogate.inputs import Inputs
from rewriters import ChannelMap, run_eval


def nearly_empty(channel_map: ChannelMap, live: Tensor) -> list[str]:
    """The layers that are left with one of their output channels or none, in words: `conv1 (1 of 64)`.

    Args:
        channel_map: classes and kernels.
        live: bool, shape (classes,), on the CPU.
    """
    found = []
    for kernel in channel_map.kernels:
        classes = channel_map.classes.get(kernel.output_side, ())
        left = channel_map.width(kernel.output_side, live)
        if len(classes) > 1 >= left:
            found.append(f"{kernel.module} ({left or 'none'} of {len(classes)})")
    return found


def signs_of_collapse(model: nn.Module, channel_map: ChannelMap, live: Tensor, inputs: Inputs, most: int = 5) -> str:
    """What a user should know before a model with these live classes is slimmed; empty if nothing is wrong.

    Args:
        model: a model with gates, folded.
        channel_map: its classes.
        live: bool, shape (classes,), on the CPU.
        inputs: example inputs.
        most: so many layers are named.
    """
    if live.all():
        return ""
    empty = nearly_empty(channel_map, live)
    named = ", ".join(empty[:most]) + (f" and {len(empty) - most} more" if empty[most:] else "")
    told = [f"at most one output channel is left of {named}"] if empty else []
    if is_constant(model, inputs):
        told.append("the outputs don't depend on the inputs any more: two different inputs give the same")
    return "; ".join(told)


def is_constant(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the model returns the same for two different inputs, in eval mode.

    False where no other inputs of the same kind can be made.
    """
    others, changed = _others(inputs)
    if not changed:
        return False
    returned, again = run_eval(model, *inputs), run_eval(model, *others)
    return bool(returned) and len(returned) == len(again) and all(map(torch.equal, returned, again))


def _others(inputs: Inputs) -> tuple[Inputs, bool]:
    """Inputs like these with other values: noise is added to numbers, whole numbers change places.

    Sparse tensors stay.
    """
    generator, changed = torch.Generator().manual_seed(0), []

    def other(x: Tensor) -> Any:
        if x.layout is not torch.strided:
            return x
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator).to(x)
            made = x + noise * x.std(correction=0).clamp(min=1.0) if x.numel() else x
        else:
            made = x.flatten().flip(0).reshape(x.shape)
        changed.append(not torch.equal(made, x))
        return made

    others = tree_map_only(Tensor, other, inputs)
    return others, any(changed)
