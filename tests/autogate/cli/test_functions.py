"""Models named as `package.module:function`: built when the command line says so, and never because a file does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import autogate
from autogate.cli import app
from autogate.training import RunFolder

CODE = """
from torch import nn

def small(num_classes=5):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )

def nothing():
    return 3

def broken():
    raise KeyError("here")
"""
DATA = ("-b", "6", "-j", "0", "--device", "cpu")


def invoke(*words: object):
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "300"})


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, with a package of models; the installed command doesn't look there by itself."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "models.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", os.getcwd())])
    for name in ("own", "own.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.slow
def test_a_run_with_a_function_of_ones_own(pictures: Path):
    asks = "--data", pictures, *DATA, "--img-size", 32, "--flops", 0.7, "--epochs", 1
    told = invoke("train", "own.models:small", *asks, "--out", "run")
    assert told.exit_code == 0, told.output
    folder = RunFolder(Path("run"))
    assert folder.info().recipe.network.name == "own.models:small" and folder.info().num_classes == 3
    longer = invoke("train", "own.models:small", "--resume", "run", "--epochs", 2)
    assert longer.exit_code == 0 and "epoch 2: loss" in longer.output, longer.output
    assert invoke("finalize", "run", "--model", "own.models:small", "--out", "again.safetensors").exit_code == 0
    x = torch.randn(2, 3, 32, 32)
    small = sys.modules["own.models"].small
    one, other = (autogate.load(file, model=small(3)) for file in ("again.safetensors", folder.slim_file))
    assert torch.equal(one(x), other(x))
    assert invoke("report", "run", "--model", "own.models:small").exit_code == 0
    told = invoke("validate", folder.slim_file, "--data", pictures, "-j", 0, "--model", "own.models:small")
    assert told.exit_code == 0 and f"{folder.result().accuracy:.2f} %" in told.output


def test_a_file_names_no_code(pictures: Path):
    asks = "--data", pictures, *DATA, "--img-size", 32, "--flops", 0.7, "--epochs", 1
    assert invoke("train", "own.models:small", *asks, "--out", "run").exit_code == 0
    del sys.modules["own.models"]
    for words in (("train", "--resume", "run", "--epochs", 2), ("finalize", "run"), ("report", "run")):
        told = invoke(*words)
        assert told.exit_code == 1 and "only the command line may name code" in told.output, told.output
    assert "own.models" not in sys.modules
    other = invoke("train", "own.models:broken", "--resume", "run")
    assert other.exit_code == 2 and "a resumed run keeps its options; omit model" in other.output


def test_inspect_and_prune():
    told = invoke("inspect", "own.models:small", "--image-size", 32)
    assert told.exit_code == 0 and "Removable channels of own.models:small" in told.output, told.output
    out = Path("slim.safetensors")
    told = invoke("prune", "own.models:small", "--image-size", 32, "--flops", 0.6, "--out", out, "--device", "cpu")
    assert told.exit_code == 0, told.output
    found = autogate.summary(autogate.load(out, model=sys.modules["own.models"].small()))
    told = invoke("summary", out, "--model", "own.models:small")
    assert told.exit_code == 0 and told.output.strip() == str(found)
    quick = "--device", "cpu", "--eager", "--seconds", "0.01", "--batch-size", 2
    with pytest.MonkeyPatch.context() as patch:  # nothing of ONNX is installed: that takes seconds
        patch.setattr("autogate.files.exporting.importlib.util.find_spec", lambda name: None)
        told = invoke("bench", out, *quick, "--model", "own.models:small")
    assert told.exit_code == 0 and "cpu, eager" in told.output, told.output
    told = invoke("summary", out)
    assert told.exit_code == 1 and "Name what builds it: --model package.module:function" in told.output
    told = invoke("summary", out, "--model", "resnet18")
    assert told.exit_code == 2 and "'resnet18' is not package.module:function" in told.output


@pytest.mark.parametrize(("name", "code", "words"), [
    ("own.mdels:small", 2, "own.mdels can't be imported: No module named 'own.mdels'"),
    ("own.models:smal", 2, "own.models has no function 'smal'. Did you mean small?"),
    ("own.models:nothing", 1, "own.models:nothing: it returned an object of type int, and not a torch.nn.Module."),
    ("own.models:broken", 1, "own.models:broken: it raised KeyError: 'here'"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_what_is_wrong_with_a_function(command: str, name: str, code: int, words: str):
    told = invoke(command, name)
    assert told.exit_code == code
    assert words in " ".join(told.output.replace("│", " ").split())
