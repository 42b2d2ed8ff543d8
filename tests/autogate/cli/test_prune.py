"""`autogate prune`: from a model's name to a slim file, with accuracies where there are labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import autogate
from autogate.cli import app

SMALL = ["--image-size", "32", "-b", "4", "-j", "0", "--device", "cpu"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of four images, dark and light, in train/ and validation/."""
    folder = tmp_path / "images"
    for split in ("train", "validation"):
        for name, shade in (("dark", 20), ("light", 230)):
            (folder / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 40), (shade, shade + index, shade)).save(folder / split / name / f"{index}.png")
    return folder


def invoke(*words: object):
    return CliRunner().invoke(app, ["prune", "test_resnet", *map(str, words)])


def test_by_weights_alone(weights: Path, tmp_path: Path):
    out = tmp_path / "slim.safetensors"
    told = invoke("--weights", weights, "--classes", 2, "--flops", 0.6, "--out", out, "--image-size", 32)
    assert told.exit_code == 0, told.output
    assert "layer1.0.conv1" in told.output and "accuracy" not in told.output
    assert 0.58 < float(re.search(r"\(([\d.]+)%\)", told.output)[1]) / 100 < 0.61
    slim = autogate.load(out)
    dense = timm.create_model("test_resnet", num_classes=2)
    dense.load_state_dict(torch.load(weights, weights_only=True))
    again = autogate.close(autogate.prepare(dense, torch.randn(2, 3, 32, 32), flops=0.6), "l1")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(slim.eval()(image), autogate.finalize(again).eval()(image))


def test_by_gradients_with_accuracies_as_json(weights: Path, images: Path, tmp_path: Path):
    words = ["--weights", weights, "--classes", 2, "--by", "taylor", "--data", images, "--batches", 2, *SMALL]
    told = invoke(*words, "--params", 0.5, "--recalibrate", "--out", tmp_path / "slim.safetensors", "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["params"] <= 0.51 * found["dense_params"]
    assert 0 <= found["accuracy"] <= 100 and 0 <= found["dense_accuracy"] <= 100
    assert all(after <= before for before, after in found["widths"].values())


def test_compensated_without_labels(weights: Path, images: Path, tmp_path: Path):
    """Compensation needs images alone; the slim model has other kernels than without."""
    words = ["--weights", weights, "--classes", 2, "--data", images / "train" / "dark", *SMALL]
    slim = {}
    for name, options in {"closed": [], "compensated": ["--compensate"]}.items():
        told = invoke(*words, *options, "--flops", 0.5, "--out", tmp_path / f"{name}.safetensors")
        assert told.exit_code == 0, told.output
        slim[name] = autogate.load(tmp_path / f"{name}.safetensors").state_dict()
    assert all(slim["closed"][name].shape == value.shape for name, value in slim["compensated"].items())
    assert any(not torch.equal(slim["closed"][name], value) for name, value in slim["compensated"].items())


def test_without_labels_that_fit(weights: Path, images: Path, tmp_path: Path):
    """One folder of images: enough for activations, not for a loss."""
    words = ["--weights", weights, "--classes", 2, "--data", images / "train" / "dark", *SMALL]
    told = invoke(*words, "--by", "activation", "--out", tmp_path / "slim.safetensors")
    assert told.exit_code == 0 and "accuracy" not in told.output, told.output
    told = invoke(*words, "--by", "taylor")
    assert told.exit_code == 1 and "the criterion 'taylor' needs labels" in told.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--by", "l7"], "no criterion 'l7'"),
        (["--by", "taylor"], "--by taylor needs images"),
        (["--recalibrate"], "--recalibrate needs images"),
        (["--compensate"], "--compensate needs images"),
        (["--allocation", "local"], "global or uniform"),
        (["--pretrained", "--weights", __file__], "can't be given with --pretrained"),
    ],
)
def test_wrong_usage(words: list[str], says: str):
    told = invoke(*words)
    assert told.exit_code == 2 and says in " ".join(told.output.replace("│", "").split())


def test_a_budget_out_of_reach_and_random_weights(tmp_path: Path):
    told = invoke("--flops", 0.0001, "--image-size", 32, "--out", tmp_path / "slim.safetensors")
    assert told.exit_code == 1
    assert "the weights are random" in told.output and "can't be reached" in told.output
    assert not (tmp_path / "slim.safetensors").exists()


@pytest.mark.slow
def test_what_budgets_would_come_to():
    words = ["inspect", "test_resnet", "--image-size", "32", "--what-if", "--by", "random"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0 and "What is left, by random" in told.output
