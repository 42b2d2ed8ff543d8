"""Slim models in files: safetensors, timm's text form, ONNX and torch.export."""

from autogate.files.atomic_write import atomic_write
from autogate.files.exporting import inputs_of, to_onnx, to_torch_export
from autogate.files.loading import dense_model, load
from autogate.files.saving import save
from autogate.files.timm_builds import TimmBuild, build_with_timm
from autogate.files.timm_text import to_timm_text

__all__ = [
    "TimmBuild",
    "atomic_write",
    "build_with_timm",
    "dense_model",
    "inputs_of",
    "load",
    "save",
    "to_onnx",
    "to_timm_text",
    "to_torch_export",
]
