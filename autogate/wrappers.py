"""What training puts around a model: torch.compile, distributed training, Accelerate's autocast."""

from __future__ import annotations

from typing import Any

from torch import nn

from rewriters import UndoLog

_WRAPPED_FORWARD = "_original_forward"
"""Where Accelerate keeps a model's forward when it puts autocast around it (`Accelerator.prepare_model`)."""

_PREPARED = "_is_accelerate_prepared"
"""Set there too: such a model isn't prepared once more."""


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
    """Whether something stands around the model, or around its forward."""
    return unwrap(model) is not model or _WRAPPED_FORWARD in model.__dict__


def take_off_accelerate(model: nn.Module, undo_log: UndoLog) -> None:
    """Gives a model the forward back that Accelerate has put autocast around, and lets it be prepared there anew.

    A forward rewritten for the slim model would go unheard beneath another, and outputs in half precision couldn't be
    compared to the last digit.
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
