"""The model of a run: as timm builds it, and with the gates that its budget asks for."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from autogate.api import prepare
from autogate.training.recipe import Budget, Network
from rewriters import AutogateError


def build_network(network: Network, num_classes: int | None, weights: bool = True) -> nn.Module:
    """The dense model.

    Args:
        network: what was asked for.
        num_classes: outputs; the model's own if None.
        weights: read those that were asked for. Without, they are random.

    Raises:
        AutogateError: timm doesn't build it so.
    """
    arguments: dict[str, Any] = {"drop_rate": network.drop, "drop_path_rate": network.drop_path}
    arguments = {name: rate for name, rate in arguments.items() if rate}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    config = get_pretrained_cfg(network.name, allow_unregistered=True)
    if network.img_size is not None and config is not None and config.fixed_input_size:
        arguments["img_size"] = network.img_size
    if weights:
        arguments |= {"pretrained": network.pretrained, "checkpoint_path": network.initial_checkpoint or ""}
    try:
        return timm.create_model(network.name, **arguments)
    except Exception as error:  # whatever an entry point makes of its arguments, or the network of a download
        raise AutogateError(f"timm can't build it with {arguments}: {error}", where=network.name) from error


def data_config(model: nn.Module, network: Network) -> dict[str, Any]:
    """Size of the images and how they are normalised: "input_size", "mean", "std", "interpolation", "crop_pct"."""
    asked = {} if network.img_size is None else {"img_size": network.img_size}
    return resolve_data_config(asked, model=model)


def with_gates(model: nn.Module, budget: Budget, input_size: tuple[int, int, int], steps: int) -> nn.Module:
    """The model, prepared for its budget.

    Args:
        model: dense, on the device that it is trained on.
        budget: what shall be left.
        input_size: channels, height and width of an image.
        steps: optimizer steps that it will be trained for.
    """
    device = next(model.parameters()).device
    shares: dict[str, Any] = {
        "flops": budget.flops, "params": budget.params, "activations": budget.activations, "latency": budget.latency
    }  # fmt: skip
    return prepare(
        model, torch.randn(2, *input_size, device=device), **shares, steps=steps, round_to=budget.round_to,
        shortcuts=budget.shortcuts, ignore=budget.ignore,
    )  # fmt: skip
