"""The accuracy of a slim model on a folder of images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from autogate.training.data import find_data, on_device, val_loader
from autogate.training.distributed import World
from autogate.training.learning import accuracy
from autogate.training.network import data_config
from autogate.training.recipe import Images, Network


@dataclass(frozen=True)
class Validation:
    """How many images of a data set's validation part a model classifies correctly (top 1), and at which size."""

    right: int
    images: int
    size: int


def validate(slim: nn.Module, images: Images, world: World, size: int | None = None) -> Validation:
    """Evaluate a slim model on the validation part of a data set, with the transforms of `autogate train`.

    Args:
        slim: a slim model, on the device of `world`.
        images: the data set.
        world: the device.
        size: side of the images in pixels; that of the model's example inputs if None.

    Raises:
        AutogateError: the data can't be used.
    """
    config = data_config(slim, Network("", img_size=size))
    loader = val_loader(find_data(images), images, config, world)
    right, seen = accuracy(slim, on_device(loader, world.device))
    return Validation(right, seen, config["input_size"][-1])
