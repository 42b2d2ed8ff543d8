"""Example inputs: those the caller gives, or some made from the configuration of a timm model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rewriters import AutogateError

BATCH = 2
"""Samples in a generated batch: with one, the batch dimension could be mistaken for another dimension of size 1."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Examples:
    """Several example inputs for `prepare`, for a model that takes other ways for other inputs.

    A forward whose control flow they decide (a mask that is given or not, a state that is None at first) is rewritten
    for each way, and its arguments choose one whenever it runs.

        >>> import torch, autogate
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
        >>> x, mask = torch.randn(2, 5, 16), torch.zeros(5, 5)
        >>> model = autogate.prepare(layer, autogate.Examples(x, (x, mask)), flops=0.9)

    Args:
        examples: each of them what `prepare` takes as example inputs: a tensor, a tuple or a dict. FLOPs, activations
            and latency are those of the first.
    """

    def __init__(self, *examples: Any):
        if not examples:
            raise ValueError("autogate.Examples needs at least one set of example inputs")
        self.examples = examples

    def __repr__(self) -> str:
        return f"Examples({len(self.examples)} sets of example inputs)"


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
        if example_inputs and all(isinstance(one, int) for one in example_inputs):
            raise AutogateError(
                f"example_inputs is a shape, {tuple(example_inputs)}, and not a tensor.",
                where=type(model).__name__,
                remedy=f"Pass torch.randn{tuple(example_inputs)}, or what the model is run on.",
            )
        return _bound(model, tuple(example_inputs), {})
    if isinstance(example_inputs, Mapping):
        return _bound(model, (), dict(example_inputs))
    raise AutogateError(
        f"example_inputs is of type {type(example_inputs).__name__}.",
        where=type(model).__name__,
        remedy="Pass a tensor, a tuple of positional arguments or a dict of keyword arguments.",
    )


def as_calls(example_inputs: Any, model: nn.Module) -> tuple[Inputs, ...]:
    """Turn `example_inputs` into one call of `model`, or several. Raises as `as_call`."""
    given = example_inputs.examples if isinstance(example_inputs, Examples) else (example_inputs,)
    return tuple(as_call(one, model) for one in given)


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


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """The arguments, if the model's forward takes such ones."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # some callables have none
        return args, kwargs
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = f"the keys {list(kwargs)}" if kwargs else f"{len(args)} arguments"
        raise AutogateError(
            f"its forward doesn't take {given}: {error}.",
            where=type(model).__name__,
            remedy=f"It is forward{signature}: pass example_inputs as a dict of its keyword arguments, or a tuple.",
        ) from None
    return args, kwargs


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
