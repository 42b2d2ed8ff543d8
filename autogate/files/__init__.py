"""Slim models in files: safetensors, timm's text form, ONNX and torch.export."""

from autogate.files.atomic_write import atomic_write
from autogate.files.data_config import DataConfig, data_config_of, set_data_config
from autogate.files.exporting import inputs_of, to_onnx, to_torch_export, write_onnx
from autogate.files.file_format import read_file
from autogate.files.loading import dense_model, load
from autogate.files.saving import save
from autogate.files.timm_builds import TimmBuild, build_with_timm
from autogate.files.timm_text import to_timm_text

__all__ = [
    "DataConfig",
    "TimmBuild",
    "atomic_write",
    "build_with_timm",
    "data_config_of",
    "dense_model",
    "inputs_of",
    "load",
    "read_file",
    "save",
    "set_data_config",
    "to_onnx",
    "to_timm_text",
    "to_torch_export",
    "write_onnx",
]
