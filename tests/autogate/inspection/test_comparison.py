"""A slim model is timed beside the dense one: what is measured and reported, not how long it takes."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import autogate
from autogate.cli import app, common
from autogate.files import dense_model, exporting
from autogate.inspection.comparison import Duration, compare


def invoke(*words: object):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def test_the_dense_model_of_a_file(slim: Path):
    shapes = {
        name: value.shape for name, value in timm.create_model("test_resnet", num_classes=10).state_dict().items()
    }
    assert {name: value.shape for name, value in dense_model(slim).state_dict().items()} == shapes


def test_every_batch_in_both_modes():
    seen: list[tuple[bool, int]] = []

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, len(x)))
            return super().forward(x)

    model = autogate.finalize(
        autogate.prepare(nn.Sequential(nn.Linear(3, 8), Watched(8, 2)), torch.randn(2, 3)), warn=False
    )
    seen.clear()
    found = list(compare(nn.Linear(3, 2), model, batches=(1, 5), devices=["cpu"], compiled=[False], seconds=0.01))
    assert [(one.device, one.runner, one.batch) for one in found] == [("cpu", "eager", 1), ("cpu", "eager", 5)]
    assert set(seen) == {(False, 1), (False, 5)}
    for one in found:
        for latency in (one.dense, one.slim):
            assert isinstance(latency, Duration) and 0 < latency.low <= latency.median <= latency.high


def test_what_does_not_run_is_told_in_its_place(slim: Path):
    (found,) = compare(
        nn.Linear(3, 2), autogate.load(slim), batches=(1,), devices=["cpu"], compiled=[False], seconds=0.01
    )
    assert isinstance(found.dense, str) and "RuntimeError" in found.dense
    assert isinstance(found.slim, Duration)


EAGER = ("--batch-size", 2, "--batch-size", 3, "--device", "cpu", "--eager", "--seconds", "0.01")


def test_the_command_tells_a_row_for_each(slim: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common.console, "width", 200)
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)  # nothing of ONNX is installed
    told = invoke(slim, *EAGER)
    assert told.exit_code == 0, told.output
    assert told.output.count("cpu, eager") == 2 and "compiled" not in told.output
    assert "not timed in onnxruntime: ONNX needs onnx and onnxscript and onnxruntime" in told.output
    assert "images: 3 x 160 x 160, bilinear, crop 0.95 (center)" in told.output


@pytest.mark.slow
def test_the_command_tells_a_row_for_each_in_onnxruntime(slim: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common.console, "width", 200)
    told = invoke(slim, *EAGER)
    assert told.exit_code == 0, told.output
    rows = [re.split(r" *│ *", line) for line in told.output.splitlines() if "cpu, onnxruntime" in line]
    assert [row[2] for row in rows] == ["2", "3"]
    assert all(float(time.split()[0]) > 0 for row in rows for time in row[3:5])


def test_what_is_wrong_is_told_without_a_traceback(slim: Path):
    for words, code, told in (
        (["no.safetensors"], 2, "there is no file"),
        ([slim, "--batch-size", 0], 2, "batch-size"),
        ([__file__], 1, "not a safetensors file"),
        ([slim, "--device", "nowhere"], 1, "nowhere"),
    ):
        result = invoke(*words)
        assert result.exit_code == code, result.output
        assert told in " ".join(result.output.replace("│", " ").split())
        assert "Traceback" not in result.output
