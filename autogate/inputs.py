"""Example inputs: those the caller gives, or some made from the configuration of a timm model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rewriters import AutogateError

BATCH = 2
"""Samples in a generated batch: with one, the batch dimension could be mistaken for another dimension of size 1."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def as_call(example_inputs: Any, model: nn.Module) -> Inputs:
    """Turn what the caller gave as `example_inputs` into positional and keyword arguments for `model`.

    Args:
        example_inputs: a tensor (the only argument), a tuple or list (positional arguments), a mapping (keyword
            arguments), or None for a random batch of the input size in the model's timm configuration.
        model: the model that is going to be run on them.

    Raises:
        AutogateError: `example_inputs` is None and the model has no timm configuration, or is of another type.
    """
    if example_inputs is None:
        return (_from_timm(model),), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise AutogateError(
        f"example_inputs is a {type(example_inputs).__name__}.",
        where=type(model).__name__,
        remedy="Pass a tensor, a tuple of positional arguments or a dict of keyword arguments.",
    )


def on_device_of(model: nn.Module, value: Any) -> Any:
    """The value with all tensors in it moved to the device of the model's parameters."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return tree_map_only(Tensor, lambda x: x.to(device), value)


def run_on(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch as loaders yield them, on the model's device.

    Args:
        model: the model.
        batch: a tensor, a mapping of keyword arguments, or a tuple or list whose first item is one of these (images
            and labels).
    """
    inputs = on_device_of(model, batch[0] if isinstance(batch, (tuple, list)) else batch)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def dtype_of_parameters(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model's first floating-point parameter; None if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def fitted(inputs: Inputs, model: nn.Module, was: torch.dtype | None = None) -> Inputs:
    """Move inputs to the model's device, and cast those of dtype `was` to the dtype of the model's parameters.

    Args:
        inputs: positional and keyword arguments.
        model: the model that is going to be run on them.
        was: the dtype that the model's parameters had when the inputs were made; None casts nothing.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = dtype_of_parameters(model)
    return tree_map_only(Tensor, lambda x: _drawn(x, device).to(device, dtype if x.dtype == was else x.dtype), inputs)


def _drawn(x: Tensor, device: torch.device) -> Tensor:
    """The tensor; if it has no values where some are needed, random ones, or zeros where numbers may mean classes."""
    if not x.is_meta or device.type == "meta":
        return x
    if not x.is_floating_point():
        return torch.zeros(x.shape, dtype=x.dtype)
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)


def _from_timm(model: nn.Module) -> Tensor:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if not size:
        raise AutogateError(
            "no example inputs were given, and the model has no timm configuration to make some from.",
            where=type(model).__name__,
            remedy="Pass example_inputs, for instance torch.randn(2, 3, 224, 224).",
        )
    image_size = _built_for(model) or tuple(size[1:])
    channels = getattr(model, "in_chans", None) or _first_kernel_width(model) or size[0]
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.randn(BATCH, channels, *image_size, dtype=reference.dtype, device=reference.device)


def _built_for(model: nn.Module) -> tuple[int, ...] | None:
    """The resolution that a model with a fixed one was built for (`img_size=` of timm's create_model)."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return tuple(size) if isinstance(size, (tuple, list)) else None


def _first_kernel_width(model: nn.Module) -> int | None:
    """Input channels of the first convolution. `in_chans=` changes these, but not the configuration."""
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    return first.in_channels if first is not None else None
