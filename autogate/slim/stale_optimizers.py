"""Tell of an optimizer that goes on with parameters that a slim model no longer has.

`finalize` takes the optimizers along that it has seen. One that hasn't stepped yet, or whose steps no hook saw, would
train tensors that no forward reads, and nothing would say so.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

_replaced = WeakTensorKeyDictionary()
"""Parameters that models had before they were slimmed. Most are gone: only a stale optimizer keeps them alive."""

_told: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_installed = False


def tell_of_steps_with(replaced: Iterable[Tensor]) -> None:
    """Warn at the first step of any optimizer that still has one of these parameters."""
    global _installed
    for parameter in replaced:
        _replaced[parameter] = True
    if not _installed:
        register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))
        _installed = True


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not len(_replaced) or optimizer in _told:
        return
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stale = sum(parameter in _replaced for parameter in own)
    if stale:
        _told.add(optimizer)
        warnings.warn(
            f"{stale} of the {len(own)} parameters of this {type(optimizer).__name__} are no longer the model's: "
            "autogate.finalize has replaced them. Pass the optimizer, autogate.finalize(model, optimizer=optimizer), "
            "or build a new one afterwards.",
            stacklevel=4,
        )
