"""The model of a run: the dense model from timm, and the prepared one."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from autogate.api import prepare
from autogate.methods import method_of
from autogate.training.recipe import Budget, Network
from rewriters import AutogateError


def build_network(network: Network, num_classes: int | None, weights: bool = True) -> nn.Module:
    """Build the dense model.

    Args:
        network: what to build.
        num_classes: number of outputs; the model's default if None.
        weights: whether to load the weights that `network` asks for. If False, the weights are random.

    Raises:
        AutogateError: timm can't build it.
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
    except Exception as error:  # timm's entry points and downloads raise errors of all kinds
        raise AutogateError(f"timm can't build it with {arguments}: {error}", where=network.name) from error


def data_config(model: nn.Module, network: Network) -> dict[str, Any]:
    """Size and normalisation of the images: "input_size", "mean", "std", "interpolation", "crop_pct"."""
    asked = {} if network.img_size is None else {"img_size": network.img_size}
    return resolve_data_config(asked, model=model)


def with_gates(
    model: nn.Module, budget: Budget, input_size: tuple[int, int, int], steps: int, method: str = "GDP()"
) -> nn.Module:  # fmt: skip
    """Prepare the model for its budget.

    Args:
        model: the dense model, on the device that it is trained on.
        budget: the budget.
        input_size: channels, height and width of an image.
        steps: number of optimizer steps that it is going to be trained for.
        method: what decides which channels die, as in `Recipe`.
    """
    device = next(model.parameters()).device
    shares: dict[str, Any] = {
        "flops": budget.flops, "params": budget.params, "activations": budget.activations, "latency": budget.latency
    }  # fmt: skip
    return prepare(
        model, torch.randn(2, *input_size, device=device), **shares, steps=steps, round_to=budget.round_to,
        shortcuts=budget.shortcuts, ignore=budget.ignore, limits=budget.limits, method=method_of(method),
    )  # fmt: skip
