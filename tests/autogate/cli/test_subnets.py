"""Several widths on the command line: train, resume, bench, report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import autogate
from autogate import subnets
from autogate.cli import app
from autogate.training import RunFolder
from tests.autogate.cli.test_train import COMPARED, TWO_PROCESSES, environment

SMALL = ("--img-size", "32", "-b", "8", "-j", "0", "--device", "cpu", "--epochs", "1")


def invoke(*words: object):
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"})


@pytest.mark.slow
def test_widths_are_trained_measured_and_drawn(
    pictures: Path, tmp_path: Path, wide: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    widths = ("--subnets", 0.3, 0.6, 1, "--subnets-by", "l1", "--subnets-rule", "sandwich", "--nested", "--distill")
    told = invoke("train", "test_resnet", "--data", pictures, *SMALL, *widths)
    assert told.exit_code == 0, told.output
    folder = RunFolder(Path("runs/test_resnet"))
    for words in ("3 widths", "dense model: accuracy", "epoch 1: loss", "switchable model:", "full"):
        assert words in told.output, words
    assert "gates" not in told.output
    model = autogate.load(folder.switchable_file)
    assert [row.structure.name for row in subnets.status(model).rows] == ["0.3", "0.6", "full"]
    again = invoke("train", "--resume", folder.path)
    assert again.exit_code == 0 and "switchable model:" in again.output
    measured = invoke("bench", folder.switchable_file, "--batch-size", 2, "--device", "cpu", "--seconds", 0.02)
    assert measured.exit_code == 0, measured.output
    for words in ("0.3", "0.6", "full", "100.0%", "switch, new (ms)", "switch, kept (ms)"):
        assert words in measured.output, words
    drawn = invoke("report", folder.path)
    assert drawn.exit_code == 0, drawn.output
    page = (folder.path / "report" / "index.html").read_text(encoding="utf-8")
    for words in ("in several widths", "Accuracy and latency", "Accuracy and FLOPs", "Channels of each layer", "0.6"):
        assert words in page, words
    for name in ("course", "widths", "flops", "times", "groups"):
        assert Image.open(folder.path / "report" / f"{name}.png").width > 300


@pytest.mark.slow
def test_two_processes_train_one_network_of_several_widths(pictures: Path, tmp_path: Path):
    """They find its channels by runs of their own, and have the same weights at the end."""
    folder, script = RunFolder(tmp_path / "run"), tmp_path / "compared.py"
    script.write_text(COMPARED)
    words = ["train", "test_resnet", "--data", pictures, *SMALL, "--subnets", 0.3, 0.6, "--subnets-rule", "sandwich"]
    done = subprocess.run(
        [sys.executable, *TWO_PROCESSES, script, *map(str, words), "--distill", "--out", folder.path],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1: loss") == 3  # two runs that find channels, and the run; one process alone talks
    assert (folder.info().processes, folder.info().steps) == (2, 1)
    sizes = folder.subnet_sizes()
    assert [one.name for one in sizes] == ["0.3", "0.6", "full"]
    for one in sizes:  # each image counts once
        assert one.accuracy == pytest.approx(round(one.accuracy * 15 / 100) * 100 / 15)
    rows = subnets.status(autogate.load(folder.switchable_file)).rows
    assert [row.structure.shares["FLOPs"] for row in rows] == pytest.approx([one.flops for one in sizes])


def test_options_of_widths_without_shares_are_refused(pictures: Path):
    told = invoke("train", "test_resnet", "--data", pictures, "--nested")
    assert told.exit_code == 2 and "--subnets" in told.output
