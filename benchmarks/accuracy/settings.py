"""The settings that methods are compared in, by name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import sentences, street_scenes
from benchmarks.accuracy.data import layout
from benchmarks.accuracy.lite0 import load_weights
from benchmarks.accuracy.models import MODELS
from benchmarks.accuracy.setting import Recipe, Setting, Sources

SIDE = 64
"""Pixels that CIFAR-10's images are enlarged to for a network that was trained on ImageNet."""


def fine_tuned(sources: Sources) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet's weights, and a new classifier of ten classes."""
    model = timm.create_model("tf_efficientnet_lite0")
    load_weights(model, sources.weights)
    model.reset_classifier(10)
    return model


def enlarged(images: Tensor) -> Tensor:
    scaled = F.interpolate(images.float() / 127.5 - 1, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return scaled.contiguous(memory_format=layout(images.device))


def made(name: str, _: Sources) -> nn.Module:
    return MODELS[name]()


CIFAR = {name: Setting(network=partial(made, name)) for name in MODELS}

SETTINGS = {
    **CIFAR,
    "resnet20": replace(CIFAR["resnet20"], flops=(0.5, 0.3, 0.15)),
    "transfer": Setting(
        network=fine_tuned, ready=enlarged, heads=("classifier",), flops=(0.5, 0.3, 0.15), from_scratch=False,
        recipe=Recipe(peak=0.02, batch=64, weight_decay=1e-4), at_once=256, needs_weights=True,
    ),
    "camvid": Setting(
        network=street_scenes.network, load=street_scenes.load, ready=street_scenes.ready, vary=street_scenes.crops,
        loss=street_scenes.loss, score=street_scenes.mean_iou, unit="mIoU (%)", heads=("segmentation_head.0",),
        flops=(0.4, 0.2), from_scratch=False, at_once=16, needs_weights=True,
        recipe=Recipe(epochs=40, peak=1e-3, batch=8, weight_decay=1e-2, optimizer="adamw"),
    ),
    "sentences": Setting(
        network=sentences.network, load=sentences.load, ready=torch.Tensor.long, vary=sentences.unchanged,
        loss=sentences.loss, answer=torch.Tensor.float, score=sentences.cosine, unit="cosine (%)", heads=(),
        flops=(0.7, 0.5), convolutional=False, from_scratch=False, at_once=128, needs_weights=True,
        recipe=Recipe(dense_epochs=0, peak=2e-4, batch=32, weight_decay=1e-2, optimizer="adamw"),
    ),
}  # fmt: skip
"""CIFAR-10 from scratch, and three networks that were trained by others on much more data: an ImageNet classifier
moved to CIFAR-10, its body as the encoder of a segmentation network, and a sentence encoder."""
