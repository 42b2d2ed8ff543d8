"""The trained networks, and real images for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.data import load, normalise
from benchmarks.accuracy.lite0 import load_weights
from benchmarks.accuracy.models import MODELS

SIDE = 96
"""Pixels that images are enlarged to for a network trained on ImageNet."""

CALIBRATION, BATCH = 256, 64


@dataclass(frozen=True)
class Subject:
    """A trained network with its images.

    Attributes:
        model: in eval mode.
        images: what agreement is measured on, in batches.
        calibration: batches of images and labels for criteria, norms and compensation.
        last: path of the layer that makes the outputs.
        unlabelled: training images as they are stored, for distillation: (N, 3, H, W) uint8.
        ready: what the network takes, of stored images.
    """

    model: nn.Module
    images: list[Tensor]
    calibration: list[tuple[Tensor, Tensor]]
    last: str
    unlabelled: Tensor
    ready: Callable[[Tensor], Tensor]


@torch.no_grad()
def predicted(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """The most likely class of each image, in eval mode, int64."""
    model.eval()
    return torch.cat([model(batch).argmax(1) for batch in batches])


def lite0(weights: Path, cifar: Path, count: int) -> Subject:
    """EfficientNet-Lite0 trained on ImageNet, on enlarged images of CIFAR-10. Its own answers are the labels."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    load_weights(model, weights)
    train, test = load(cifar, "train"), load(cifar, "test").some(count)
    batches = [enlarged(part) for part in train.some(CALIBRATION).inputs.split(BATCH)]
    calibration = [(batch, predicted(model, [batch])) for batch in batches]
    images = [enlarged(part) for part in test.inputs.split(BATCH)]
    return Subject(model, images, calibration, "classifier", train.inputs, enlarged)


def enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images.float() / 127.5 - 1, size=(SIDE, SIDE), mode="bicubic", align_corners=False)


def trained(name: str, weights: Path, cifar: Path, count: int) -> Subject:
    """A network that `benchmarks.accuracy run` has trained on CIFAR-10."""
    model = MODELS[name]().eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    train, test = load(cifar, "train"), load(cifar, "test").some(count)
    parts = zip(*(tensor.split(BATCH) for tensor in train.some(CALIBRATION)), strict=True)
    calibration = [(normalise(images), labels) for images, labels in parts]
    images = [normalise(part) for part in test.inputs.split(BATCH)]
    return Subject(model, images, calibration, "fc", train.inputs, normalise)


NETWORKS: dict[str, Callable[[Path, Path, int], Subject]] = {
    "lite0": lite0,
    **{name: partial(trained, name) for name in ("resnet20", "vgg16_half")},
}
