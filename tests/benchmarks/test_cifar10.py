"""The CIFAR-10 benchmark runs on noise, and its figures are drawn."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.data import Data
from benchmarks.accuracy.models import ResNet
from benchmarks.accuracy.setting import Recipe
from benchmarks.accuracy.settings import CIFAR
from benchmarks.cifar10 import gated_run

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from benchmarks import cifar10_channels, cifar10_polarization


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind of shortcuts, four epochs of six steps long."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    dense = ResNet(8)
    data = Data(torch.randint(0, 255, (48, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (48,)))
    setting = replace(CIFAR["resnet20"], recipe=Recipe(epochs=4, batch=8))
    for shortcuts in ("shared", "conv"):
        result = gated_run(dense, data, data, setting, 0.5, shortcuts)
        (folder / f"{shortcuts}.json").write_text(json.dumps(result))
    return folder


def drawn(module, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """The figure that a script writes."""
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    module.main()
    return Path(arguments[-1]).read_text()


@pytest.mark.parametrize("shortcuts", ["shared", "conv"])
def test_at_every_epoch_the_slim_network_is_as_accurate_as_the_gated_one(runs, shortcuts):
    result = json.loads((runs / f"{shortcuts}.json").read_text())
    assert len(result["curve"]) == 4 and result["predictions_that_differ"] == 0
    for point in result["curve"]:
        assert point["accuracy_slim"] == point["accuracy_gated"]
        assert sum(point["gates"]) == result["gates"]
    assert result["flops_left"] == pytest.approx(0.5, abs=0.01) and result["gates_between_0.01_and_0.5"] == 0


def test_the_course_of_a_runs_gates_is_drawn(runs, tmp_path, monkeypatch):
    out = tmp_path / "figures" / "polarization.svg"
    assert "</svg>" in drawn(cifar10_polarization, monkeypatch, "--run", runs / "shared.json", "--out", out)


def test_the_channels_of_each_layer_are_drawn(runs, tmp_path, monkeypatch):
    out = tmp_path / "figures" / "shortcuts.svg"
    assert "</svg>" in drawn(cifar10_channels, monkeypatch, "--runs", runs, "--out", out)
