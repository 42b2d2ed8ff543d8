"""1x1 convolutions on a model's identity shortcuts, where the caller of `prepare` asks for them."""

from __future__ import annotations

import warnings

from torch import nn

from autogate.naming import did_you_mean
from autogate.slim.finalizing import verify
from autogate.slim.record_replay import AnalysisOptions, add_shortcut_convolutions
from rewriters import AutogateError, Outputs, Replaced, UndoLog


def asked_shortcut_convolutions(model: nn.Module, options: AnalysisOptions, undo_log: UndoLog) -> Replaced:
    """As `add_shortcut_convolutions`, with a check of what was asked, and that outputs stay what they were.

    Raises:
        AutogateError: `options.shortcuts` names no module.
        VerificationError: the outputs would differ.
    """
    shortcuts = options.shortcuts
    if shortcuts == "shared":
        return Replaced((), {})
    if shortcuts != "conv":
        paths = [path for path, _ in model.named_modules() if path]
        for path in (shortcuts,) if isinstance(shortcuts, str) else shortcuts:
            if path not in paths:
                wrong = f"shortcuts is {path!r}" if isinstance(shortcuts, str) else f"shortcuts names {path!r}"
                raise AutogateError(
                    f"{wrong}, which is not a module of the model.",
                    where=type(model).__name__,
                    remedy=did_you_mean(path, ["shared", "conv", *paths]),
                )
    calls = (options.inputs, *options.others)
    wanted = [Outputs.of(model, *call) for call in calls]
    replaced = add_shortcut_convolutions(model, options, undo_log)
    if not replaced.shortcuts:
        why = "; ".join(f"{path}: {reason}" for path, reason in replaced.shared.items())
        warnings.warn(
            f"{type(model).__name__}: shortcuts={shortcuts!r} changed nothing: no identity shortcut in it is the only "
            f"thing that couples removable channels{f', or it has to stay ({why})' if why else ''}",
            stacklevel=6,
        )
    for call, outputs in zip(calls, wanted, strict=True) if replaced.shortcuts else ():
        verify(model, call, outputs, "the model with convolutions on its shortcuts")
    return replaced
