"""Wrappers that training puts around a model: torch.compile, distributed training, Accelerate's autocast."""

from __future__ import annotations

from typing import Any

from torch import nn

from rewriters import UndoLog

_WRAPPED_FORWARD = "_original_forward"
"""Where `Accelerator.prepare_model` keeps a model's own forward when it wraps that in autocast."""

_PREPARED = "_is_accelerate_prepared"
"""Attribute that Accelerate sets too: it doesn't prepare such a model again."""


def child_of(model: Any, name: str) -> Any:
    """The child module of this name; None if there is none. (The children of a scripted module have no `get`.)"""
    return model._modules[name] if isinstance(model, nn.Module) and name in model._modules else None


def unwrap(model: Any) -> Any:
    """The model inside torch.compile's and the distributed wrappers."""
    while True:
        inner = model.__dict__.get("_modules", {}).get("_orig_mod") if isinstance(model, nn.Module) else None
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def is_wrapped(model: nn.Module) -> bool:
    """Whether there is a wrapper around the model or around its forward."""
    return unwrap(model) is not model or _WRAPPED_FORWARD in model.__dict__


def unwrap_accelerate(model: nn.Module, undo_log: UndoLog) -> None:
    """Restore the forward that Accelerate wrapped in autocast, and let Accelerate prepare the model again.

    Beneath the wrapped forward, a rewritten forward of the slim model would never be called; and outputs in half
    precision could not be compared to the last digit.
    """
    if _PREPARED in model.__dict__:
        undo_log.remove(model.__dict__, _PREPARED)
    forward = model.__dict__.get(_WRAPPED_FORWARD)
    if forward is None:
        return
    undo_log.remove(model.__dict__, _WRAPPED_FORWARD)
    if getattr(forward, "__func__", None) is type(model).forward:
        undo_log.remove(model.__dict__, "forward")
    else:
        undo_log.set_attribute(model, "forward", forward)
