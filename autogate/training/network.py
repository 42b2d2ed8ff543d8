"""The model of a run: the dense model from timm, or a slim one from a file, and the prepared one."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, load_state_dict
from torch import nn

from autogate.api import prepare
from autogate.files import DataConfig, inputs_of, load, set_data_config
from autogate.methods import GDP, method_of
from autogate.saliency import saliency_of
from autogate.slim import history_of
from autogate.training.recipe import Budget, Network
from rewriters import AutogateError, run_eval

ModelFunction = Callable[..., nn.Module]
"""Returns a dense model. It is called with `num_classes=` if it has such a parameter, else without arguments."""


def build_network(
    network: Network, num_classes: int | None, weights: bool = True, function: ModelFunction | None = None
) -> nn.Module:
    """Build the dense model.

    Args:
        network: what to build.
        num_classes: number of outputs; the model's default if None.
        weights: whether to load the weights that `network` asks for. If False, the weights are random.
        function: what builds the model, if its name is that of a function. A name alone is never imported, because
            it may come from a file.

    Raises:
        AutogateError: timm or the function can't build it.
    """
    if is_slim_file(network.name):
        return _slim_again(network, num_classes)
    if names_function(network.name):
        model = _called(network, num_classes, function)
        if weights and network.initial_checkpoint is not None:
            load_weights(model, network.initial_checkpoint)
        return model
    arguments: dict[str, Any] = {"drop_rate": network.drop, "drop_path_rate": network.drop_path}
    arguments = {name: rate for name, rate in arguments.items() if rate}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    config = get_pretrained_cfg(network.name, allow_unregistered=True)
    if network.img_size is not None and config is not None and config.fixed_input_size:
        arguments["img_size"] = network.img_size
    arguments["pretrained"] = weights and network.pretrained
    try:
        model = timm.create_model(network.name, **arguments)
    except Exception as error:  # timm's entry points and downloads raise errors of all kinds
        raise AutogateError(f"timm can't build it with {arguments}: {error}", where=network.name) from error
    if weights and network.initial_checkpoint is not None:
        load_weights(model, network.initial_checkpoint)
    return model


def is_slim_file(name: str) -> bool:
    """Whether a network's name is a file of a slim model, and not a model of timm's."""
    return name.endswith(".safetensors")


def names_function(name: str) -> bool:
    """Whether a network's name is that of a function, `package.module:function`.

    >>> names_function("models.small:build"), names_function("hf_hub:timm/resnet18"), names_function("resnet18")
    (True, False, False)
    """
    return re.fullmatch(r"(?!hf_hub:)\w+(\.\w+)*:\w+", name) is not None


def _called(network: Network, num_classes: int | None, function: ModelFunction | None) -> nn.Module:
    """The model that a function returns."""
    if function is None:
        raise AutogateError(
            "a function builds this model, and only the command line may name code.",
            where=network.name,
            remedy=f"Name it there: autogate train {network.name} --resume RUN, autogate finalize RUN --model "
            f"{network.name}, or the same for autogate report.",
        )
    _check_no_timm_options(
        network, {"--drop": network.drop, "--drop-path": network.drop_path, "--pretrained": network.pretrained}
    )
    takes = inspect.signature(function).parameters
    arguments = {} if num_classes is None or "num_classes" not in takes else {"num_classes": num_classes}
    try:
        model: Any = function(**arguments)
    except Exception as error:  # it is the user's
        raise AutogateError(f"it raised {type(error).__name__}: {error}", where=network.name) from error
    if not isinstance(model, nn.Module):
        raise AutogateError(
            f"it returned an object of type {type(model).__name__}, and not a torch.nn.Module.", where=network.name
        )
    return model


def outputs_of(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """The number of outputs for an image: as the model says in `num_classes`, or counted.

    Raises:
        AutogateError: the output for images (N, C, H, W) is not one tensor (N, outputs), or it can't be run on them.
    """
    known = getattr(model, "num_classes", None)
    if isinstance(known, int):
        return known
    images = torch.randn(2, *input_size, device=next(model.parameters()).device)
    try:
        found = run_eval(model, (images,))
    except Exception as error:  # it is the user's
        raise AutogateError(
            f"it can't be run on images of shape {tuple(images.shape)}: {error}",
            where=type(model).__name__,
            remedy="Give the side of its images.",
        ) from error
    if len(found) != 1 or found[0].ndim != 2:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
        raise AutogateError(
            f"its outputs have shapes {shapes}; a classifier returns one tensor (N, classes).",
            where=type(model).__name__,
        )
    return int(found[0].shape[1])


def _check_no_timm_options(network: Network, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value:
            raise AutogateError(f"{option} is for models that timm builds.", where=network.name)


def _slim_again(network: Network, num_classes: int | None) -> nn.Module:
    """A slim model out of its file, to be slimmed further. A resumed run needs the file too."""
    model = load(network.name)
    outputs = getattr(model, "num_classes", None)
    if num_classes is not None and outputs != num_classes:
        raise AutogateError(
            f"the model in this file has {outputs} outputs, and {num_classes} are needed.",
            where=network.name,
            remedy="A slim model keeps its classes. Start from the dense model for other data.",
        )
    given = {"--drop": network.drop, "--drop-path": network.drop_path, "--pretrained": network.pretrained,
             "--initial-checkpoint": network.initial_checkpoint}  # fmt: skip
    _check_no_timm_options(network, given)
    return model


def load_weights(model: nn.Module, path: str) -> None:
    """Load a file of weights into a timm model. A classifier for another number of classes stays as it is, new.

    Raises:
        AutogateError: the file can't be read, or its weights are not this model's.

    Warns:
        UserWarning: the classifier is new.
    """
    try:
        state = dict(load_state_dict(path))
    except Exception as error:  # damaged files and pickles of other things raise errors of all kinds
        raise AutogateError(f"no weights can be read from it: {error}", where=path) from error
    own = model.state_dict()
    config = getattr(model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    other = [
        name for name in state
        if name.startswith(tuple(f"{head}." for head in heads)) and name in own and own[name].shape != state[name].shape
    ]  # fmt: skip
    if other:
        there = state[other[0]].shape[0]
        warnings.warn(
            f"the classifier is new: {path} has {there} classes, and the model has {own[other[0]].shape[0]}.",
            stacklevel=3,
        )
    try:
        model.load_state_dict({**state, **{name: own[name] for name in other}})
    except RuntimeError as error:
        raise AutogateError(f"its weights are not those of this model: {error}", where=path) from error


def data_config(model: nn.Module, network: Network) -> dict[str, Any]:
    """Size and normalisation of the images, with the keys of `timm.data.resolve_data_config`.

    The size is the one that is asked for, or that a slim model was prepared with, or timm's.
    """
    size = network.img_size
    if size is None and (history_of(model) is not None or saliency_of(model) is not None):
        args, _ = inputs_of(model, 1)
        size = int(args[0].shape[-1])
    return resolve_data_config({} if size is None else {"img_size": size}, model=model)


def note_data_config(model: nn.Module, config: Mapping[str, Any], class_names: Sequence[str], outputs: int) -> None:
    """Write into a model what images it is trained on, and its classes if each output has a name, for its slim file."""
    names = tuple(class_names) if class_names and len(class_names) == outputs else None
    set_data_config(model, DataConfig(**config, label_names=names))


def with_gates(
    model: nn.Module, budget: Budget, input_size: tuple[int, int, int], steps: int, per_epoch: int,
    method: str = "GDP()",
) -> nn.Module:  # fmt: skip
    """Prepare the model for its budget.

    Args:
        model: the dense model, on the device that it is trained on.
        budget: the budget.
        input_size: channels, height and width of an image.
        steps: number of optimizer steps that it is going to be trained for.
        per_epoch: number of those in an epoch, for a method that asks for it.
        method: what decides which channels die, as in `Recipe`.
    """
    decides = method_of(method)
    if isinstance(decides, GDP) and decides.epsilon_factor is not None:
        decides = replace(decides, steps_per_epoch=per_epoch)
    device = next(model.parameters()).device
    shares: dict[str, Any] = {
        "flops": budget.flops, "params": budget.params, "activations": budget.activations, "latency": budget.latency
    }  # fmt: skip
    return prepare(
        model, torch.randn(2, *input_size, device=device), **shares, steps=steps, round_to=budget.round_to,
        shortcuts=budget.shortcuts, ignore=budget.ignore, limits=budget.limits, method=decides,
    )  # fmt: skip
