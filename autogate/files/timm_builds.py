"""How timm builds a model: the name and arguments of `timm.create_model` that give the dense model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from pydantic import JsonValue
from timm.layers import DropPath
from timm.models import FeatureInfo
from torch import nn

from autogate.slim import History, describe_modules, describe_tensors, first_difference
from rewriters import AutogateError

_WEIGHTS_FROM_ELSEWHERE = ("pretrained", "checkpoint_path", "cache_dir", "weights")
"""Beginnings of the names of arguments that make timm read weights or configurations from elsewhere."""


@dataclass(frozen=True)
class TimmBuild:
    """`timm.create_model(name, **arguments)` gives the dense model."""

    name: str
    arguments: Mapping[str, JsonValue]


def build_with_timm(how: TimmBuild) -> nn.Module:
    """The dense model, its weights random; nothing is downloaded or read from a file.

    Raises:
        AutogateError: timm has no such model, or doesn't build it with these arguments.
    """
    where = f"timm.create_model({how.name!r})"
    if any(sign in how.name for sign in ":/\\") or not timm.is_model(how.name):
        raise AutogateError(f"timm {timm.__version__} has no model of this name.", where=where)
    for name in how.arguments:
        if name.startswith(_WEIGHTS_FROM_ELSEWHERE):
            raise AutogateError(f"{name} is no argument that says how a model is built.", where=where)
    try:
        with torch.random.fork_rng(devices=[]):  # whoever saves in the middle of a run trains on as if he hadn't
            arguments: dict[str, Any] = dict(how.arguments)
            return timm.create_model(how.name, pretrained=False, **arguments)
    except Exception as error:  # whatever an entry point makes of its arguments
        raise AutogateError(f"timm can't build it with {dict(how.arguments)}: {error}", where=where) from error


def find_timm_build(
    model: nn.Module, history: History, arguments: Mapping[str, Any] | None = None
) -> tuple[TimmBuild | None, str]:
    """How timm builds the dense model that `model` was slimmed from, found by trying; None, and why, if it doesn't.

    Args:
        model: the slim model.
        history: its history.
        arguments: what the caller knows of the arguments that it was built with.

    Raises:
        AutogateError: the caller gave arguments, and with these it doesn't.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if not isinstance(config, Mapping) or not config.get("architecture"):
        if arguments is not None:
            raise AutogateError(
                "it doesn't say which of timm's models it is.",
                where=type(model).__name__,
                remedy="Leave `model_args` out.",
            )
        return None, "it is none of timm's models"
    name = ".".join(part for part in (config["architecture"], config.get("tag")) if part)
    how = TimmBuild(name, {**_arguments(model, config), **(arguments or {})})
    try:
        wrong = _difference(build_with_timm(how), history)
    except AutogateError as error:
        wrong = str(error)
    if not wrong:
        return how, ""
    shown = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in how.arguments.items())])
    why = f"timm.create_model({shown}) gives another model: {wrong}"
    if arguments is not None:
        raise AutogateError(why, where=type(model).__name__, remedy="Correct `model_args`, or leave them out.")
    return None, why


def _arguments(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of create_model that can be read off a model, where they aren't what they are by default."""
    found: dict[str, Any] = {}
    classes = getattr(model, "num_classes", None)
    features = getattr(model, "feature_info", None)
    if isinstance(features, FeatureInfo):
        found["features_only"] = True
        found["out_indices"] = [int(index) for index in features.out_indices]
    elif isinstance(classes, int) and classes != config.get("num_classes"):
        found["num_classes"] = classes
    first = next((module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)), None)
    size = config.get("input_size")
    if first is not None and size and first.in_channels != size[0]:
        found["in_chans"] = first.in_channels
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size and isinstance(built_for, (tuple, list)) and tuple(built_for) != tuple(size[1:]):
        found["img_size"] = [int(side) for side in built_for]
    rate = getattr(model, "drop_rate", 0.0)
    if isinstance(rate, float) and rate:
        found["drop_rate"] = rate
    depth = max((module.drop_prob or 0.0 for module in model.modules() if isinstance(module, DropPath)), default=0.0)
    if depth:
        found["drop_path_rate"] = round(depth, 6)  # timm spreads it over the blocks in float32
    return found


def _difference(built: nn.Module, history: History) -> str:
    """Where a model that timm built is not the dense one, in a sentence; empty if it is."""
    before = history.slimmings[0].tensors
    shapes = first_difference(
        {name: spec.shape for name, spec in describe_tensors(built).items()},
        {name: spec.shape for name, spec in before.items()},
    )
    if shapes is not None:
        name, here, there = shapes
        return f"{name} is {here} in it, and was {there}"
    modules = first_difference(describe_modules(built), history.dense_modules)
    if modules is not None:
        name, here, there = modules
        return f"{name or 'the model'} is {here} in it, and was {there}"
    return ""
