"""Fixtures of the tests of files, of training runs and of switchable models."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import autogate
from tests.autogate.switching.nets import fused, small_net


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a small slim model of timm's."""
    torch.manual_seed(0)
    model = autogate.prepare(timm.create_model("test_resnet", num_classes=10), torch.randn(2, 3, 64, 64), flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    path = tmp_path_factory.mktemp("slim") / "slim.safetensors"
    autogate.save(autogate.finalize(model, warn=False).eval(), path)
    return path


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line writes to a wide terminal, whatever it found when it was imported: tables break no heading."""
    monkeypatch.setattr("autogate.cli.common.console._width", 200)


CLASSES = ("blue", "green", "red")


def paint(folder: Path, counts: dict[str, int]) -> Path:
    """A folder of noisy images of 32 pixels, `counts` of each class under each of its parts."""
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for channel, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 50
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images to train on and 15 to evaluate on, of three classes."""
    return paint(tmp_path_factory.mktemp("pictures"), {"train": 8, "validation": 5})


@pytest.fixture
def net():
    """A switchable model with two subnets beside the whole, the slim models that these equal, and inputs."""
    model, example = small_net()
    switchable, slim = fused(model, example, (0.2, 0.5))
    return switchable, slim, example
