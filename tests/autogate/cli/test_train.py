"""`autogate train` and `autogate finalize`: a whole run, signals, resuming, two processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import autogate
from autogate.cli import app
from autogate.training import EpochRow, RunFolder
from autogate.training.checkpoint import load_checkpoint
from autogate.training.run_folder import GateRow

ROOT = Path(__file__).parents[3]
SMALL = ["--img-size", "32", "-b", "6", "-j", "0", "--device", "cpu", "--flops", "0.7"]


def invoke(*words: object):
    return CliRunner().invoke(app, [*map(str, words)])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def test_a_run_from_the_first_word_to_the_last(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    told = invoke("train", "test_resnet", "--data", pictures, *SMALL, "--epochs", 1)
    assert told.exit_code == 0, told.output
    folder = RunFolder(Path("runs/test_resnet"))
    for words in ("24 training and 15 validation images of 3 classes", "dense model: accuracy", "epoch 1: loss"):
        assert words in told.output
    assert folder.result().step == 4
    again = invoke("train", "test_resnet", "--data", pictures, *SMALL)
    assert again.exit_code == 1 and "--resume runs/test_resnet" in again.output
    finished = invoke("train", "--resume", folder.path, "--workers", 0)
    assert finished.exit_code == 0 and "slim / dense" in finished.output
    fixed = invoke("train", "--resume", folder.path, "--lr", 1, "--opt", "adamw")
    assert fixed.exit_code == 2 and "lr, opt" in " ".join(fixed.output.replace("│", " ").split())
    longer = invoke("train", "--resume", folder.path, "--epochs", 2)
    assert longer.exit_code == 0 and "epoch 2: loss" in longer.output and "8 steps" in longer.output, longer.output
    shorter = invoke("train", "--resume", folder.path, "--epochs", 1)
    assert shorter.exit_code == 1 and "fewer than the 2 of the run" in shorter.output
    slim = invoke("finalize", folder.checkpoint_file, "--out", "slim.safetensors")
    assert slim.exit_code == 0, slim.output
    assert "after 8 of 8 steps" in slim.output
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(autogate.load("slim.safetensors")(x), autogate.load(folder.slim_file)(x))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_to_resume_from(
    number: int, code: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    folder, add = RunFolder(Path("runs/test_resnet")), RunFolder.add

    def add_and_signal(self: RunFolder, row: EpochRow, gates: GateRow) -> None:
        add(self, row, gates)
        if row.epoch == 1:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add", add_and_signal)
        told = invoke("train", "test_resnet", "--data", pictures, *SMALL, "--epochs", 3)
    assert told.exit_code == code and "Traceback" not in told.output, told.output
    assert load_checkpoint(folder.checkpoint_file).position.step == 4 and not folder.slim_file.exists()
    (command,) = (line.partition("autogate ")[2] for line in told.output.splitlines() if "--resume" in line)
    resumed = invoke(*shlex.split(command))
    assert resumed.exit_code == 0 and "dense model" not in resumed.output, resumed.output
    assert folder.slim_file.exists() and [row.epoch for row in folder.metrics()] == [0, 1, 2, 3]


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def stopped(
    words: list[str], folder: RunFolder, rows: int, number: int, launched: Sequence[str] = ()
) -> tuple[int, str]:
    """Exit code and words of a run that gets a signal when its folder has more than so many epochs."""
    run = subprocess.Popen(
        [sys.executable, *launched, "-m", "autogate.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    while not (folder.gates_file.exists() and len(folder.gates()) > rows) and run.poll() is None:
        time.sleep(0.1)
    os.killpg(run.pid, number)  # as a terminal or a batch system does: the processes that load images get it too
    told, _ = run.communicate(timeout=200)
    return run.returncode, told


@pytest.mark.slow
def test_signals_to_a_group_of_processes_leave_a_checkpoint(pictures: Path, tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    words = ["train", "test_resnet", "--data", str(pictures), *SMALL, "-j", "1", "--epochs", "500"]
    code, told = stopped([*words, "--out", str(folder.path)], folder, 1, signal.SIGINT)
    assert code == 130 and "Traceback" not in told, told
    first = load_checkpoint(folder.checkpoint_file).position
    assert first.step >= 4 and not folder.slim_file.exists()
    (command,) = (line.partition("resume with: autogate ")[2] for line in told.splitlines() if "resume with" in line)
    code, told = stopped(shlex.split(command), folder, len(folder.gates()), signal.SIGTERM)
    assert code == 143 and "Traceback" not in told, told
    assert load_checkpoint(folder.checkpoint_file).position.step > first.step
    assert [row.epoch for row in folder.metrics()] == list(range(len(folder.gates())))
    finalized = invoke("finalize", folder.path)
    assert finalized.exit_code == 0 and "warning: finalized before" in finalized.output
    assert folder.slim_file.exists() and not folder.result().complete


COMPARED = """
import torch
import torch.distributed as dist
from autogate.cli import app
from autogate.training.loop import Loop
from autogate.training.switchable import SwitchableLoop


def compared(finish):
    def compare(run, row):
        for name, value in run.model.named_parameters():
            first = value.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, value), f"{name} differs"
        return finish(run, row)
    return compare


for kind in (Loop, SwitchableLoop):
    kind.finish = compared(kind.finish)
app()
"""


@pytest.mark.slow
def test_two_processes_train_one_model(pictures: Path, tmp_path: Path):
    """They have the same weights at the end, though the slim model was wrapped anew on the way."""
    folder, script = RunFolder(tmp_path / "run"), tmp_path / "compared.py"
    script.write_text(COMPARED)
    words = [str(script), "train", "test_resnet", "--data", str(pictures), *SMALL, "--epochs", "3"]
    done = subprocess.run(
        [sys.executable, *TWO_PROCESSES, *words, "--model-ema", "--out", str(folder.path)],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1: loss") == 1  # the first process alone talks
    info, result = folder.info(), folder.result()
    assert (info.processes, info.batches, info.steps) == (2, 2, 6)
    assert [row.step for row in folder.metrics()] == [0, 2, 4, 6]
    assert load_checkpoint(folder.checkpoint_file).gates is not None
    assert result.accuracy == pytest.approx(round(result.accuracy * 15 / 100) * 100 / 15)  # each image once


@pytest.mark.slow
def test_two_processes_go_on_from_where_they_stopped(pictures: Path, tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    words = ["train", "test_resnet", "--data", str(pictures), *SMALL, "--epochs", "500", "--out", str(folder.path)]
    code, _ = stopped(words, folder, 1, signal.SIGINT, TWO_PROCESSES)
    assert code != 0
    first = load_checkpoint(folder.checkpoint_file).position
    assert first.step >= 2
    rows = len(folder.gates())
    code, told = stopped(["train", "--resume", str(folder.path)], folder, rows, signal.SIGINT, TWO_PROCESSES)
    assert ": loss" in told and "epoch 1: loss" not in told, told
    assert load_checkpoint(folder.checkpoint_file).position.step > first.step
    assert [row.epoch for row in folder.metrics()] == list(range(len(folder.gates())))


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["train"], 2, "name a timm model"),
        (["train", "resnet5O", "--data", "."], 2, "Did you mean resnet50"),
        (["train", "test_resnet"], 2, "--data"),
        (["train", "test_resnet", "--data", "no/such/folder"], 1, "there is no such folder or data set"),
        (["train", "test_resnet", "--data", ".", "--opt", "sdg"], 1, "sgd"),
        (["train", "test_resnet", "--data", ".", "--device", "abacus"], 1, "abacus can't be used"),
        (["train", "--resume", "no/such/run"], 1, "no run in this folder"),
        (["finalize", "no/such/run"], 2, "nothing at"),
        (["finalize", __file__], 1, "not a checkpoint"),
    ],
)
def test_what_is_wrong_is_told_without_a_traceback(words: list[str], code: int, told: str):
    result = invoke(*words)
    assert result.exit_code == code, result.output
    assert told in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
    if code == 1:
        assert isinstance(invoke(*words, "--debug").exception, autogate.AutogateError)
