"""How timm builds the dense model: a name and arguments for `timm.create_model`.

The arguments are read off a model as far as they show. Then the model is built with them, and every tensor's shape and
every module's text are compared with those of the dense model. If they differ, the file says that `load` needs
`model=`, and why. Only names in timm's own registry are built, and never with arguments that make timm read other
files.
"""

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

from autogate.saliency import saliency_of
from autogate.slim import TensorSpec, describe_modules, describe_tensors, first_difference, history_of
from autogate.switching import subnets_of
from rewriters import AutogateError

_WEIGHTS_FROM_ELSEWHERE = ("pretrained", "checkpoint_path", "cache_dir", "weights")
"""Prefixes of the names of arguments that make timm read weights or configurations from elsewhere."""


@dataclass(frozen=True)
class TimmBuild:
    """`timm.create_model(name, **arguments)` builds the dense model."""

    name: str
    arguments: Mapping[str, JsonValue]


@dataclass(frozen=True)
class Dense:
    """What a record says of the dense model.

    Attributes:
        tensors: its parameters and buffers, by name.
        modules: its modules by path, each as a line of text (`describe_modules`).
    """

    tensors: Mapping[str, TensorSpec]
    modules: Mapping[str, str]


def dense_of(model: nn.Module) -> Dense:
    """The dense model that a slim, switchable or adaptive one was made from.

    Raises:
        AutogateError: it is none of these.
    """
    history, subnets, bank = history_of(model), subnets_of(model), saliency_of(model)
    if history is not None:
        return Dense(history.slimmings[0].tensors, history.dense_modules)
    if subnets is not None:
        return Dense(subnets.record.tensors, subnets.record.modules)
    if bank is not None:
        return Dense(describe_tensors(model, bank.added), bank.form.modules)
    raise AutogateError(
        "it was not slimmed: it has no record of a slimming.",
        where=type(model).__name__,
        remedy="Save the model that autogate.finalize returned. For other models use torch.save.",
    )


def build_with_timm(how: TimmBuild) -> nn.Module:
    """Build the dense model with random weights. Nothing is downloaded or read from a file.

    Raises:
        AutogateError: timm has no such model, or can't build it with these arguments.
    """
    _check_allowed(how)
    try:
        return _created(how)
    except Exception as error:  # timm's entry points raise errors of all kinds
        reason = str(error)[:1000]
        raise AutogateError(f"timm can't build it with {dict(how.arguments)}: {reason}", where=_place(how)) from error


def outline_with_timm(how: TimmBuild) -> nn.Module | None:
    """Build the dense model on the meta device: its modules and shapes, without values and without memory for them.

    Returns:
        The model; None if its constructor can't run there, because it asks for a value. All of timm's can; a model that
        you registered might not.

    Raises:
        AutogateError: timm has no such model, or arguments are not allowed.
    """
    _check_allowed(how)
    try:
        with torch.device("meta"):
            return _created(how)
    except Exception:  # then building it for real tells what is wrong, if anything is
        return None


def _place(how: TimmBuild) -> str:
    return f"timm.create_model({how.name!r})"


def _check_allowed(how: TimmBuild) -> None:
    if any(sign in how.name for sign in ":/\\") or not timm.is_model(how.name):
        raise AutogateError(f"timm {timm.__version__} has no model with this name.", where=_place(how))
    for name in how.arguments:
        if name.startswith(_WEIGHTS_FROM_ELSEWHERE):
            raise AutogateError(
                f"the argument {name!r} is not allowed: it makes timm read weights or configurations from elsewhere.",
                where=_place(how),
            )


def _created(how: TimmBuild) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # a save in the middle of a run leaves its random numbers alone
        arguments: dict[str, Any] = dict(how.arguments)
        return timm.create_model(how.name, pretrained=False, **arguments)


def find_timm_build(
    model: nn.Module, dense: Dense, arguments: Mapping[str, Any] | None = None
) -> tuple[TimmBuild | None, str]:
    """Find out how timm builds the dense model that `model` was made from, by building it.

    Args:
        model: slim, or with subnets.
        dense: what is known of the dense model.
        arguments: arguments of `timm.create_model` that the caller knows of.

    Returns:
        How timm builds it and an empty text; or None and the reason, if timm doesn't build this model.

    Raises:
        AutogateError: the caller gave arguments, and timm builds another model with them.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if not isinstance(config, Mapping) or not config.get("architecture"):
        if arguments is not None:
            raise AutogateError(
                "it doesn't say which timm model it is, so `model_args` can't be used.",
                where=type(model).__name__,
                remedy="Omit `model_args`.",
            )
        return None, "it is not a timm model"
    name, own = _known_name(config)
    how = TimmBuild(name, {**_arguments(model, own), **(arguments or {})})
    try:
        wrong = _difference(build_with_timm(how), dense)
    except AutogateError as error:
        wrong = str(error)
    if not wrong:
        return how, ""
    shown = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in how.arguments.items())])
    why = f"timm.create_model({shown}) builds another model: {wrong}"
    if arguments is not None:
        raise AutogateError(why, where=type(model).__name__, remedy="Correct `model_args`, or omit them.")
    return None, why


def _known_name(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name by which timm builds a model with this configuration, and timm's own configuration of that name.

    The model's may say what it was trained on since: other images and classes than `create_model` builds it for. Its
    tag may be that of weights from elsewhere, which timm doesn't know; the architecture is the same.
    """
    architecture, tag = config["architecture"], config.get("tag")
    for name in (f"{architecture}.{tag}", architecture) if tag else (architecture,):
        try:
            found = timm.get_pretrained_cfg(name)
        except RuntimeError:  # an unknown tag
            continue
        return name, config if found is None else found.to_dict()
    return architecture, config


def _arguments(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of create_model that can be read off a model and that differ from the defaults."""
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


def _difference(built: nn.Module, dense: Dense) -> str:
    """The first difference between a model that timm built and the dense one, in words; empty if there is none."""
    shapes = first_difference(
        {name: spec.shape for name, spec in describe_tensors(built).items()},
        {name: spec.shape for name, spec in dense.tensors.items()},
    )
    if shapes is not None:
        name, here, there = shapes
        return f"{name} is {here} there, and was {there} in the dense model"
    modules = first_difference(describe_modules(built), dense.modules)
    if modules is not None:
        name, here, there = modules
        return f"{name or 'the model'} is {here} there, and was {there} in the dense model"
    return ""
