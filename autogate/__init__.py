"""autogate: learn which channels a model can do without, then make the model physically smaller.

model = autogate.prepare(model, flops=0.5, steps=10_000)   # add gates: same object, same outputs
train(model)                                               # your own training loop
slim = autogate.finalize(model)                            # plain layers, half the FLOPs, same outputs

What is exported here is imported at its first use, so that `autogate --help` doesn't wait for PyTorch and timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from autogate.version import __version__

if TYPE_CHECKING:
    from autogate import adaptive, subnets
    from autogate.api import BudgetNotMetWarning, CollapseWarning, finalize, gates, prepare, step, summary
    from autogate.budget import Resource, SideCounts
    from autogate.closing import close
    from autogate.files import load, save, to_onnx, to_timm_text, to_torch_export
    from autogate.gating import GateBank
    from autogate.inputs import Examples
    from autogate.inspection import Summary
    from autogate.methods import GDP, ClippedLasso
    from autogate.outlook import what_if
    from autogate.slim import recalibrate
    from rewriters import AutogateError, CaptureError, SurgeryError, VerificationError

_EXPORTS = {
    "autogate.api": ("BudgetNotMetWarning", "CollapseWarning", "finalize", "gates", "prepare", "step", "summary"),
    "autogate.budget": ("Resource", "SideCounts"),
    "autogate.closing": ("close",),
    "autogate.files": ("load", "save", "to_onnx", "to_timm_text", "to_torch_export"),
    "autogate.gating": ("GateBank",),
    "autogate.inputs": ("Examples",),
    "autogate.inspection": ("Summary",),
    "autogate.methods": ("GDP", "ClippedLasso"),
    "autogate.slim": ("recalibrate",),
    "autogate.outlook": ("what_if",),
    "autogate.adaptive": (),
    "autogate.subnets": (),
    "rewriters": ("AutogateError", "CaptureError", "SurgeryError", "VerificationError"),
}
"""What is exported, by its folder: the imports above, for when the program runs."""

_HOMES = {name: home for home, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return found
    folder = f"{__name__}.{name}"
    if folder in _EXPORTS:  # autogate.budget and others, as if they were imported with the package
        return importlib.import_module(folder)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    folders = {home.removeprefix("autogate.") for home in _EXPORTS if home.startswith("autogate.")}
    return sorted({*globals(), *_HOMES, *folders})


__all__ = [
    "GDP",
    "AutogateError",
    "BudgetNotMetWarning",
    "CaptureError",
    "ClippedLasso",
    "CollapseWarning",
    "Examples",
    "GateBank",
    "Resource",
    "SideCounts",
    "Summary",
    "SurgeryError",
    "VerificationError",
    "__version__",
    "adaptive",
    "close",
    "finalize",
    "gates",
    "load",
    "prepare",
    "recalibrate",
    "save",
    "step",
    "subnets",
    "summary",
    "to_onnx",
    "to_timm_text",
    "to_torch_export",
    "what_if",
]
