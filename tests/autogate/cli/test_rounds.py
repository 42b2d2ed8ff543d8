"""What comes before and after a run: weights with other classes, a second round from a slim file, validation."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from typer.testing import CliRunner

import autogate
from autogate.cli import app
from autogate.cli.train import _Bar
from autogate.files import data_config_of
from autogate.training import Network, RunFolder, StepMetrics, build_network, finalize_checkpoint

SMALL = ("-b", "6", "-j", "0", "--device", "cpu")


def invoke(*words: object):
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def first(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of one epoch, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    options = (*SMALL, "--img-size", 32, "--flops", 0.7, "--epochs", 1, "--out", folder)
    told = invoke("train", "test_resnet", "--data", pictures, *options)
    assert told.exit_code == 0, told.output
    return folder, told.output


@pytest.mark.parametrize(("terminal", "interval", "lines"), [
    (False, None, ["50", "100"]), (True, None, []), (True, 30, ["30", "60", "90", "120"]),
])  # fmt: skip
def test_lines_within_an_epoch(first, terminal, interval, lines):
    written = io.StringIO()
    bar = _Bar(Console(file=written, force_terminal=terminal, width=200), interval)
    bar.started(RunFolder(first[0]).info(), 0)
    for step in range(10, 130, 10):
        bar.stepped(StepMetrics(1, step, 0.5, 0.01, 0.9, 7))
    bar.finished()
    assert re.findall(r"step (\d+)/4, epoch 1/1, loss 0.500, ", written.getvalue()) == lines


def test_the_accuracy_of_a_slim_file(first, pictures: Path):
    folder, _ = first
    told = invoke("validate", folder / "slim.safetensors", "--data", pictures, *SMALL)
    assert told.exit_code == 0, told.output
    assert f"accuracy {RunFolder(folder).result().accuracy:.2f} % (top 1)" in told.output
    assert "of 15 images at 32 pixels" in told.output
    alone = invoke("validate", folder / "slim.safetensors", "--data", pictures / "validation", *SMALL)
    assert alone.output == told.output and alone.exit_code == 0
    assert invoke("validate", "nothere.safetensors", "--data", pictures).exit_code == 2


def test_images_and_classes_are_told_by_the_file(first, pictures: Path, tmp_path: Path):
    folder = RunFolder(first[0])
    slim = autogate.load(folder.slim_file)
    assert slim.pretrained_cfg["label_names"] == ("blue", "green", "red") == folder.info().class_names
    assert resolve_model_data_config(slim)["input_size"] == (3, 32, 32)
    assert folder.result().data_config == data_config_of(slim)
    told = invoke("summary", folder.slim_file)
    assert "3 x 32 x 32" in told.output and "3: blue, green, red" in told.output
    finalize_checkpoint(folder.path, tmp_path / "slim.safetensors")
    assert autogate.load(tmp_path / "slim.safetensors").pretrained_cfg == slim.pretrained_cfg


def test_classes_with_other_names_are_warned_of(first, pictures: Path, tmp_path: Path):
    shutil.copytree(pictures, tmp_path / "data")
    for part in ("train", "validation"):
        (tmp_path / "data" / part / "green").rename(tmp_path / "data" / part / "cyan")
    told = invoke("validate", first[0] / "slim.safetensors", "--data", tmp_path / "data", *SMALL)
    assert told.exit_code == 0 and "class 1 is 'cyan' in the data and 'green' in the model" in told.output
    assert "warning" not in invoke("validate", first[0] / "slim.safetensors", "--data", pictures, *SMALL).output


def test_a_folder_from_before_classes_had_names(first, tmp_path: Path):
    shutil.copytree(first[0], tmp_path / "run", ignore=shutil.ignore_patterns("*.pt"))
    for name, key in (("run.json", "class_names"), ("result.json", "data_config")):
        content = json.loads((tmp_path / "run" / name).read_text())
        del content[key]
        (tmp_path / "run" / name).write_text(json.dumps(content))
    folder = RunFolder(tmp_path / "run")
    assert folder.info().class_names == () and folder.result().data_config is None


@pytest.mark.slow
def test_a_second_round(first, pictures: Path, tmp_path: Path):
    folder, _ = first
    slim = folder / "slim.safetensors"
    told = invoke("train", slim, "--data", pictures, *SMALL, "--flops", 0.8, "--epochs", 1, "--out", tmp_path / "again")
    assert told.exit_code == 0, told.output
    again = RunFolder(tmp_path / "again")
    assert again.info().input_size == (3, 32, 32)
    assert again.info().flops == pytest.approx(RunFolder(folder).result().flops)
    found = autogate.summary(autogate.load(again.slim_file))
    assert found.flops == again.result().flops < again.info().flops < found.all_flops
    assert invoke("report", tmp_path / "again").exit_code == 0
    refused = invoke("train", slim, "--data", pictures, *SMALL, "--pretrained", "--out", tmp_path / "other")
    assert refused.exit_code == 1 and "--pretrained is for models that timm builds" in refused.output


def weights(path: Path, classes: int) -> dict[str, torch.Tensor]:
    state = timm.create_model("test_resnet", num_classes=classes).state_dict()
    save_file(state, path)
    return state


def test_weights_with_other_classes_leave_the_classifier_new(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    state = weights(path, 10)
    with pytest.warns(UserWarning, match="the classifier is new: .* has 10 classes, and the model has 3"):
        model = build_network(Network("test_resnet", initial_checkpoint=str(path)), 3)
    own = model.state_dict()
    assert own["fc.weight"].shape[0] == 3
    assert all(torch.equal(own[name], value) for name, value in state.items() if not name.startswith("fc."))
    model = build_network(Network("test_resnet", initial_checkpoint=str(path)), 10)
    assert torch.equal(model.fc.weight, state["fc.weight"])


def test_weights_of_another_model_are_refused(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(autogate.AutogateError, match="its weights are not those of this model"):
        build_network(Network("test_resnet", initial_checkpoint=str(path)), 3)
    path.write_bytes(b"nothing")
    with pytest.raises(autogate.AutogateError, match="no weights can be read from it"):
        build_network(Network("test_resnet", initial_checkpoint=str(path)), 3)
