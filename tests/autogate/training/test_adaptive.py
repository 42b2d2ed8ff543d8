"""A run of a model that chooses its channels for each image: trained, stopped anywhere, gone on with bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import autogate
from autogate import adaptive
from autogate.cli import app
from autogate.training import Budget, Choice, Recipe, RunFolder, Widths, finalize_checkpoint, resume, start
from rewriters import AutogateError
from tests.autogate.training.runs import After, everything, recipe


def asked(pictures: Path, **changes) -> Recipe:
    plain = {"budget": Budget(flops=0.9), "adaptive": Choice(0.2)}
    return dataclasses.replace(recipe(pictures), **{**plain, **changes})


@pytest.fixture(scope="module")
def done(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("runs") / "adaptive"
    assert start(asked(pictures), folder) is not None
    return RunFolder(folder)


def test_a_run_saves_a_model_that_chooses_and_what_images_use(done: RunFolder, pictures: Path):
    result, info = done.result(), done.info()
    assert result is not None and result.complete and resume(done.path) == result
    model, use = autogate.load(done.adaptive_file), done.use()
    assert use is not None and len(use.shares) == info.val_images
    assert adaptive.bank(model).kept.layers == use.layers
    assert result.shares == {"FLOPs": pytest.approx(use.mean, abs=1e-4)} and info.targets == {"FLOPs": 0.9}
    assert int(adaptive.bank(model).step_count) == info.steps
    rows = done.metrics()
    assert rows[0].flops == 1.0 and rows[-1].flops == pytest.approx(float(adaptive.bank(model).cost))
    assert all(Image.open(file).size == (min(8, info.val_images) * 32, 32) for file in done.picture_files)
    made = finalize_checkpoint(done.path)
    before = load_file(done.adaptive_file)
    assert made.file == done.adaptive_file and made.result.accuracy == result.accuracy
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(made.file).items())


@pytest.mark.parametrize("kind", ["plain", pytest.param("everything", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_with_the_same_bits(kind: str, pictures: Path, tmp_path: Path, done: RunFolder):
    wanted = asked(pictures)
    if kind == "everything":
        wanted = dataclasses.replace(wanted, **everything(wanted.images))
        assert start(wanted, tmp_path / "whole") is not None
        done = RunFolder(tmp_path / "whole")
    stop = After(4)
    assert start(wanted, tmp_path / "run", callbacks=[stop], stop=stop) is None
    assert resume(tmp_path / "run") is not None
    one, other = load_file(done.adaptive_file), load_file(RunFolder(tmp_path / "run").adaptive_file)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"budget": Budget(flops=0.9, params=0.5)}, "no --params"),
        ({"budget": Budget(flops=0.9, shortcuts="conv")}, "no --shortcuts"),
        ({"budget": Budget()}, "Give --flops 0.35"),
        ({"subnets": Widths((0.3,))}, "no --subnets"),
    ],
)
def test_what_a_choice_cannot_be_combined_with(changes, part: str, pictures: Path, tmp_path: Path):
    with pytest.raises(AutogateError, match=part):
        start(asked(pictures, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line(pictures: Path, tmp_path: Path, wide: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    small = ("--img-size", "32", "-b", "8", "-j", "0", "--device", "cpu", "--epochs", "1", "--data", str(pictures))
    told = CliRunner().invoke(app, ["train", "test_resnet", *small, "--adaptive", "--flops", "0.9", "--warmup", "0.3"])
    assert told.exit_code == 0, told.output
    for words in ("a choice for each image", "90.0% of the FLOPs", "FLOPs of an image, on average", "adaptive model:"):
        assert words in told.output, words
    assert "gates" not in told.output
    assert adaptive.bank(autogate.load("runs/test_resnet/adaptive.safetensors")).run.warmup == 0.3
    told = CliRunner().invoke(app, ["train", "test_resnet", *small, "--warmup", "0.3"])
    assert told.exit_code == 2 and "--adaptive" in told.output
    model = autogate.load("runs/test_resnet/adaptive.safetensors")
    adaptive.budget(model, flops=0.8, batches=[torch.randn(8, 3, 32, 32)])  # so few steps leave nearly all on
    autogate.save(model, "runs/test_resnet/adaptive.safetensors")
    drawn = ("--images", str(pictures / "validation"), "--batch-size", "1", "--batch-size", "3", "--device", "cpu")
    told = CliRunner().invoke(app, ["bench", "runs/test_resnet/adaptive.safetensors", *drawn, "--seconds", "0.02"])
    assert told.exit_code == 0, told.output
    for words in ("static / dense", "adaptive / dense", "on average", "15 images", "as the static model does"):
        assert words in told.output, words
    told = CliRunner().invoke(
        app, ["validate", "runs/test_resnet/adaptive.safetensors", "--data", str(pictures), "-j", "0"]
    )
    assert told.exit_code == 0 and "at 32 pixels" in told.output, told.output
