"""Models by name, their origin and their inputs: all of timm's, and torchvision's as "torchvision:NAME"."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import _registry
from torch import Tensor, nn

from autogate.inputs import Inputs, as_call

TORCHVISION = "torchvision:"

BATCH = 2

LEAST_SIDES = {"inception": 299, "ssd300": 300}
"""Side of the images for torchvision models that can't run on smaller ones, by a part of their names."""

SHALLOW: dict[str, dict[str, Any]] = {
    "vit_7b_*": {"depth": 2},
    "vit_5b_*": {"depth": 2, "num_kv_heads": (32, 16)},
    "eva02_enormous_*": {"depth": 2},
    "aimv2_3b_*": {"depth": 2},
    "vit_gigantic_*": {"depth": 2},
    "vit_pe_*_gigantic_*": {"depth": 2},
    "swinv2_cr_giant_*": {"depths": (1, 1, 2, 1)},
}
"""timm's arguments for models that don't fit into 20 GiB with all their blocks, by patterns of their names."""

RESIZED = ("vit_*_patch*", "eva*_patch*", "beit*_patch*", "deit*_patch*", "aimv2_*_patch*")
"""Models with a fixed image size that timm builds for any multiple of their patch size, with `img_size`."""


class DenseParts(nn.Module):
    """Backbone, neck and heads of a torchvision detector, without the steps that depend on values of tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone = model.backbone
        self.head = model.rpn.head if hasattr(model, "rpn") else model.head

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        return self.head(list(features.values()) if isinstance(features, dict) else [features])


@dataclass(frozen=True)
class Listed:
    """A model that can be built.

    Attributes:
        name: timm's name, or "torchvision:" and torchvision's name.
        family: the file that the model is defined in.
        side: side of the images to run it on, if it takes any size; 0 for the size it is configured for.
    """

    name: str
    family: str
    side: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for timm besides the name: fewer blocks if all of them don't fit, and smaller images."""
        found = (arguments for pattern, arguments in SHALLOW.items() if fnmatch.fnmatchcase(self.name, pattern))
        patches = re.search(r"_patch(\d+)", self.name)
        if not self.side or not any(fnmatch.fnmatchcase(self.name, pattern) for pattern in RESIZED):
            return next(found, {})
        return {**next(found, {}), "img_size": self.side // int(patches[1]) * int(patches[1])}

    def build(self) -> nn.Module:
        if not self.name.startswith(TORCHVISION):
            return timm.create_model(self.name, **self.arguments)
        model = torchvision.models.get_model(self.name.removeprefix(TORCHVISION), weights=None, **self._options())
        return DenseParts(model) if "detection" in self.family else model

    def _options(self) -> dict[str, None]:
        takes_backbone = any(kind in self.family for kind in ("detection", "segmentation"))
        return {"weights_backbone": None} if takes_backbone else {}

    def inputs(self, model: nn.Module) -> Inputs:
        """A batch of two."""
        if self.name.startswith(TORCHVISION):
            return self._torchvision_inputs(), {}
        return as_call(self._resized(model), model)

    def _torchvision_inputs(self) -> tuple[Tensor, ...]:
        if "video" in self.family:
            side = 112 if "resnet" in self.family else 224
            return (torch.randn(BATCH, 3, 16, side, side),)
        least = next((size for name, size in LEAST_SIDES.items() if name in self.name), 0)
        side = max(self.side or 224, least)
        images = 2 if "optical_flow" in self.family else 1
        return tuple(torch.randn(BATCH, 3, side, side) for _ in range(images))

    def _resized(self, model: nn.Module) -> Tensor | None:
        """A batch of smaller images, if the model takes them; else None."""
        if "img_size" in self.arguments:
            return None  # its own size is smaller
        config = model.default_cfg
        channels, own = config["input_size"][0], config["input_size"][-1]
        if not self.side or config.get("fixed_input_size") or self.side >= own:
            return None
        return torch.randn(BATCH, channels, self.side, self.side)

    @staticmethod
    def shape(inputs: Inputs) -> tuple[int, ...]:
        """Shape of a sample of the first tensor."""
        args, kwargs = inputs
        return tuple(next(iter((*args, *kwargs.values()))).shape[1:])


def listed(side: int = 0) -> list[Listed]:
    """All timm models, then the torchvision models whose forward takes and returns tensors."""
    ours = [Listed(name, _registry._model_to_module[name], side) for name in timm.list_models()]
    theirs = [
        Listed(
            TORCHVISION + name, torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision."), side
        )
        for name in torchvision.models.list_models()
        if ".quantization." not in torchvision.models.get_model_builder(name).__module__
    ]
    return [*ours, *theirs]


def smallest_of_each_file(models: Iterable[Listed], cache: Path, most: float = math.inf) -> list[Listed]:
    """The model with the fewest parameters of each file, without the models that timm made for tests.

    The numbers are kept in `cache`, because building every model takes minutes, even without weights.

    Args:
        models: the models to choose from.
        cache: file of the numbers of parameters, by name.
        most: files whose smallest model has more parameters than that have none.
    """
    counts = json.loads(cache.read_text()) if cache.exists() else {}
    smallest: dict[str, Listed] = {}
    for one in models:
        if one.name.startswith("test_"):
            continue
        if one.name not in counts:
            counts[one.name] = _count_parameters(one)
        if one.family not in smallest or counts[one.name] < counts[smallest[one.family].name]:
            smallest[one.family] = one
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(counts))
    return [one for one in smallest.values() if counts[one.name] <= most]


def _count_parameters(one: Listed) -> int:
    """Count parameters, without memory for them if the model can be built that way."""
    try:
        with torch.device("meta"):
            model = one.build()
    except Exception:  # it computes with the tensors that it builds
        model = one.build()
    return sum(parameter.numel() for parameter in model.parameters())
