"""How images become a model's inputs, and what its outputs stand for, as timm keeps it in `model.pretrained_cfg`.

A slim model's file has it, so that `timm.data.resolve_model_data_config` says of the loaded model what it said of the
one that was saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from rewriters import AutogateError, UndoLog

NAME = "data_config"
"""Key of the metadata of ONNX files, and of torch.export's extra files (with ".json"), that has the config as JSON."""


@dataclass(frozen=True)
class DataConfig:
    """Keys of timm's `pretrained_cfg` that whoever runs the model needs. None where the model doesn't say.

    Attributes:
        input_size: channels, height and width of an image.
        interpolation: how images are resized: "bilinear", "bicubic" ...
        crop_pct: side of the crop, as a part of the resized image's shorter side.
        crop_mode: "center", "squash" or "border".
        mean, std: for each channel, what is subtracted from values in [0, 1], and what they are then divided by.
        label_names: names of the classes, in the order of the outputs.
    """

    input_size: tuple[int, int, int] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    label_names: tuple[str, ...] | None = None

    def rows(self) -> tuple[tuple[str, str], ...]:
        """What is known, in words: pairs of a heading and a text.

        >>> DataConfig((3, 32, 32), "bicubic", 0.875, "center", label_names=("cat", "dog")).rows()
        (('images', '3 x 32 x 32, bicubic, crop 0.875 (center)'), ('classes', '2: cat, dog'))
        """
        crop = None if self.crop_pct is None else f"crop {self.crop_pct:g} ({self.crop_mode or 'center'})"
        size = None if self.input_size is None else " x ".join(map(str, self.input_size))
        scale = (("mean", self.mean), ("std", self.std))
        found = [
            ("images", ", ".join(text for text in (size, self.interpolation, crop) if text)),
            *((name, ", ".join(f"{value:.4g}" for value in values)) for name, values in scale if values is not None),
        ]
        if self.label_names is not None:
            more = ", ..." if len(self.label_names) > MOST_NAMES else ""
            found.append(("classes", f"{len(self.label_names)}: {', '.join(self.label_names[:MOST_NAMES])}{more}"))
        return tuple((name, text) for name, text in found if text)


MOST_NAMES = 8
"""Names of classes that a line shows."""

_KIND = TypeAdapter(DataConfig)


def data_config_of(model: nn.Module) -> DataConfig | None:
    """What a model's `pretrained_cfg` says; None if it has none, or says nothing of images and classes.

    Names of classes that aren't as many as the model's outputs are those of another classifier, and left out.

    Raises:
        AutogateError: a value there can't be stored.
    """
    said = getattr(model, "pretrained_cfg", None)
    if not isinstance(said, Mapping):
        return None
    try:
        found = _KIND.validate_python({name: said.get(name) for name in DataConfig.__dataclass_fields__})
    except ValidationError as error:
        first = error.errors()[0]
        raise AutogateError(
            f"its pretrained_cfg[{first['loc'][0]!r}] can't be stored: {first['msg']}.",
            where=type(model).__name__,
            remedy="Give it the form that timm has, or delete the key.",
        ) from error
    outputs = getattr(model, "num_classes", None)
    if found.label_names is not None and isinstance(outputs, int) and outputs != len(found.label_names):
        found = replace(found, label_names=None)
    return None if found == DataConfig() else found


def set_data_config(model: nn.Module, config: DataConfig, undo_log: UndoLog | None = None) -> None:
    """Write a config into a model's `pretrained_cfg`. What the config doesn't say stays."""
    known = getattr(model, "pretrained_cfg", None)
    known = dict(known) if isinstance(known, Mapping) else {}
    said: dict[str, Any] = {name: value for name, value in asdict(config).items() if value is not None}
    if all(known.get(name) == value for name, value in said.items()):
        return
    undo_log = undo_log or UndoLog()
    for name in ("pretrained_cfg", "default_cfg"):  # the second is timm's older name for the first
        if name == "pretrained_cfg" or hasattr(model, name):
            undo_log.set_attribute(model, name, {**known, **said})


def as_json(config: DataConfig) -> str:
    """The config as JSON, without what it doesn't say."""
    return _KIND.dump_json(config, exclude_none=True).decode()
