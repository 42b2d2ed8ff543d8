"""The accuracy of a slim model on a folder of images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import nn

from autogate.files import data_config_of
from autogate.training.data import find_labelled, on_device, val_loader
from autogate.training.distributed import World
from autogate.training.learning import accuracy
from autogate.training.network import data_config, outputs_of
from autogate.training.recipe import Images, Network


@dataclass(frozen=True)
class Validation:
    """How many images of a data set's validation part a model classifies correctly (top 1), and at which size."""

    right: int
    images: int
    size: int


def validate(slim: nn.Module, images: Images, world: World, size: int | None = None) -> Validation:
    """Evaluate a slim model on the validation part of a data set, with the transforms of `autogate train`.

    Classes are matched by their names, if the model has these and the data has no others, else by their numbers.

    Args:
        slim: a slim model, on the device of `world`.
        images: the data set; a folder may be the validation part itself.
        world: the device.
        size: side of the images in pixels; that of the model's example inputs if None.

    Raises:
        AutogateError: the data can't be used.

    Warns:
        UserWarning: the data has classes that the model wasn't trained on.
    """
    config, known = data_config(slim, Network("", img_size=size)), data_config_of(slim)
    names = None if known is None else known.label_names
    data = find_labelled(images, names, outputs_of(slim, config["input_size"]))
    if names and data.class_names:
        _check_names(names, data.class_names)
    loader = val_loader(data.images, images, config, world)
    right, seen = accuracy(slim, on_device(loader, world.device))
    return Validation(right, seen, config["input_size"][-1])


def _check_names(names: Sequence[str], there: Sequence[str]) -> None:
    """Warn if classes of the data have other numbers than in training."""
    number = next((i for i, pair in enumerate(zip_longest(names, there)) if pair[0] != pair[1]), None)
    if number is not None:
        words = (repr(one[number]) if number < len(one) else "missing" for one in (there, names))
        warnings.warn(
            f"class {number} is {next(words)} in the data and {next(words)} in the model. The accuracy takes classes "
            "by their numbers.",
            stacklevel=3,
        )
