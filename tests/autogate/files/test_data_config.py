"""What a model says of its images and classes goes with its file: loaded, exported, saved again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

import autogate
from autogate.files import DataConfig, data_config_of, set_data_config
from autogate.files.timm_builds import Dense, find_timm_build
from autogate.slim import describe_modules, describe_tensors
from rewriters import UndoLog

NAMES = ("cat", "dog", "owl")
SAID: dict[str, Any] = {
    "input_size": (3, 64, 64), "interpolation": "bilinear", "crop_pct": 0.8, "crop_mode": "squash",
    "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "label_names": NAMES,
}  # fmt: skip


def slim_of(model: nn.Module, side: int = 64) -> nn.Module:
    model = autogate.prepare(model, torch.randn(2, 3, side, side), flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    return autogate.finalize(model, warn=False).eval()


@pytest.fixture(scope="module")
def told() -> nn.Module:
    """A slim model that says all there is to say."""
    slim = slim_of(timm.create_model("test_resnet", num_classes=3))
    set_data_config(slim, DataConfig(**SAID))
    return slim


def test_it_comes_back(told: nn.Module, tmp_path: Path):
    path = tmp_path / "slim.safetensors"
    autogate.save(told, path)
    loaded = autogate.load(path)
    assert resolve_model_data_config(loaded) == {key: value for key, value in SAID.items() if key != "label_names"}
    assert loaded.pretrained_cfg == told.pretrained_cfg and loaded.default_cfg["label_names"] == NAMES
    autogate.save(loaded, path)
    assert data_config_of(autogate.load(path)) == DataConfig(**SAID)


def test_a_size_that_a_model_was_built_for_is_still_found():
    """It is read off the model beside timm's own size, and not beside the one that the model says."""
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    set_data_config(model, DataConfig(input_size=(3, 32, 32)))
    how, why_not = find_timm_build(model, Dense(describe_tensors(model), describe_modules(model)))
    assert how is not None and how.arguments == {"num_classes": 3, "img_size": [32, 32]}, why_not


def test_a_tag_that_timm_does_not_know_is_left_out():
    """Weights from elsewhere have tags of their own; the architecture is what is built."""
    model = timm.create_model("test_resnet", num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "tag": "mine_in3"}
    how, why_not = find_timm_build(model, Dense(describe_tensors(model), describe_modules(model)))
    assert how is not None and (how.name, how.arguments) == ("test_resnet", {"num_classes": 3}), why_not


def test_a_model_with_gates_is_not_saved(tmp_path: Path):
    model = autogate.prepare(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(2, 4))
    with pytest.raises(autogate.AutogateError, match=r"it has gates: it is prepared, .* Finalize it first"):
        autogate.save(model, tmp_path / "slim.safetensors")


def test_a_model_that_is_not_timms(tmp_path: Path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 3, 3))

    path, slim = tmp_path / "slim.safetensors", slim_of(build(), 8)
    assert data_config_of(slim) is None
    autogate.save(slim, path)
    assert not hasattr(autogate.load(path, build()), "pretrained_cfg")
    slim.pretrained_cfg = {"mean": [0.5, 0.5, 0.5], "label_names": list(NAMES)}
    autogate.save(slim, path)
    assert autogate.load(path, build()).pretrained_cfg == {"mean": (0.5, 0.5, 0.5), "label_names": NAMES}


@pytest.mark.slow
def test_exported_files_have_it_with_the_size_that_they_take(told: nn.Module, tmp_path: Path):
    autogate.to_torch_export(told, tmp_path / "slim.pt2", side=32)
    extra = {"data_config.json": ""}
    torch.export.load(tmp_path / "slim.pt2", extra_files=extra)
    assert json.loads(extra["data_config.json"]) == json.loads(json.dumps({**SAID, "input_size": (3, 32, 32)}))


@pytest.mark.slow
def test_so_do_onnx_files(told: nn.Module, tmp_path: Path):
    autogate.to_onnx(told, tmp_path / "slim.onnx")
    (entry,) = onnx.load(tmp_path / "slim.onnx").metadata_props
    assert entry.key == "data_config" and json.loads(entry.value) == json.loads(json.dumps(SAID))


def test_names_of_another_classifier_are_left_out():
    model = timm.create_model("test_resnet", num_classes=4)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": NAMES}
    assert data_config_of(model).label_names is None


def test_a_value_that_no_file_can_hold_is_named(tmp_path: Path):
    slim = slim_of(timm.create_model("test_resnet", num_classes=3))
    slim.pretrained_cfg = {**slim.pretrained_cfg, "mean": lambda image: image}
    with pytest.raises(autogate.AutogateError, match=r"its pretrained_cfg\['mean'\] can't be stored"):
        autogate.save(slim, tmp_path / "slim.safetensors")


def test_a_load_that_fails_leaves_the_model_alone():
    model, log = timm.create_model("test_resnet"), UndoLog()
    before = model.pretrained_cfg
    set_data_config(model, DataConfig(label_names=NAMES), log)
    assert model.pretrained_cfg["label_names"] == NAMES
    log.undo()
    assert model.pretrained_cfg is before is model.default_cfg
