"""Checkpoint files: damage is noticed, and the checkpoint before a damaged one is taken, aloud."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import autogate
from autogate.training import RunFolder, finalize_checkpoint, resume, start
from autogate.training.checkpoint import load_checkpoint, load_newest, previous_checkpoint, save_checkpoint
from autogate.training.tensor_files import checksum, read_tensors, write_tensors
from benchmarks.damage import checkpoint, damaged_checkpoints, damaged_slim_files
from tests.autogate.training.runs import After, recipe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The newest of two checkpoints."""
    for step in (1, 2):
        save_checkpoint(checkpoint(step), tmp_path / "last.pt")
    return tmp_path / "last.pt"


def damage(file: Path) -> None:
    """Flip a bit of a tensor."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("alone", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_damaged_checkpoint_is_read_without_a_word(alone: bool):
    for counts in damaged_checkpoints(12, alone).values():
        assert counts["silently different"] == counts["other error"] == 0
        assert counts["clear error" if alone else "previous taken"] > 0


def test_no_damaged_slim_file_is_read_without_a_word():
    for counts in damaged_slim_files(12).values():
        assert counts["silently different"] == counts["other error"] == counts["unchanged"] == 0


def test_the_checkpoint_before_is_kept_and_is_no_copy_of_the_newest(file: Path):
    assert load_checkpoint(file).position.step == 2
    assert load_checkpoint(previous_checkpoint(file)).position.step == 1
    save_checkpoint(checkpoint(3), file)
    assert load_checkpoint(previous_checkpoint(file)).position.step == 2
    assert {one.name for one in file.parent.iterdir()} == {"last.pt", "previous-last.pt"}


def test_the_checkpoint_before_is_taken_aloud(file: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_newest(file)[1] == file
    damage(file)
    with pytest.warns(UserWarning, match=r"last\.pt: it is damaged.*previous-last\.pt, epoch 1, step 1"):
        found, taken = load_newest(file)
    assert (found.position.step, taken) == (1, previous_checkpoint(file))
    file.unlink()
    with pytest.warns(UserWarning, match="there is no file"):
        assert load_newest(file)[0].position.step == 1
    damage(previous_checkpoint(file))
    with pytest.raises(FileNotFoundError):
        load_newest(file)


def test_a_run_goes_on_from_the_checkpoint_before(pictures: Path, tmp_path: Path):
    whole, parts, stop = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts"), After(4)
    start(recipe(pictures), whole.path)
    assert start(recipe(pictures), parts.path, callbacks=[stop], stop=stop) is None
    damage(parts.checkpoint_file)
    with pytest.raises(autogate.AutogateError, match="damaged"):
        finalize_checkpoint(parts.checkpoint_file)
    with pytest.warns(UserWarning, match="before it is taken instead"):
        finalize_checkpoint(parts.path, tmp_path / "slim.safetensors")
    with pytest.warns(UserWarning, match="before it is taken instead"):
        assert resume(parts.path) == whole.result()
    assert parts.metrics()[1].accuracy == whole.metrics()[1].accuracy
    ours, theirs = load_file(parts.slim_file), load_file(whole.slim_file)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    load_checkpoint(previous_checkpoint(parts.checkpoint_file))  # not the damaged one


def test_a_file_system_without_links_keeps_a_copy(file: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any) -> None:
        raise PermissionError

    monkeypatch.setattr("os.link", refuse)
    save_checkpoint(checkpoint(3), file)
    assert load_checkpoint(previous_checkpoint(file)).position.step == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("position", {"epoch": 1}, "its position can't be read"),
        ("position", 7, "its position can't be read"),
        ("position", {"epoch": "1", "batch": 0, "step": 0, "loss": 0.0, "seconds": 0.0, "lr": None}, "its position"),
        ("run", 7, "its run can't be read"),
        ("run", "{}", "its format can't be read"),
        ("model", [1], "its model is of type list, not a state_dict"),
        ("optimizer", None, "its optimizer is of type NoneType"),
        ("gates", 3, "its gates is of type int"),
        ("format", 2, "not a checkpoint that this version"),
    ],
)
def test_odd_content_is_told(file: Path, name: str, value: Any, message: str):
    write_tensors({**read_tensors(file), name: value}, file)
    with pytest.raises(autogate.AutogateError, match=message):
        load_checkpoint(file)


def test_the_checksum_is_of_all_that_a_file_holds(tmp_path: Path):
    tensor = torch.arange(6.0).reshape(2, 3)
    state = torch.nn.BatchNorm1d(3).state_dict()
    others = [
        tensor.double(), tensor.reshape(3, 2), tensor.t().contiguous().t(), tensor + 1, tensor.tolist(), {"a": tensor},
        (tensor,), [tensor], {1: tensor}, {"1": tensor}, 1, 1.0, True, "1", None, state, dict(state), tensor.bfloat16(),
        tensor.to_sparse(), torch.tensor(1.0), torch.empty(0), torch.empty(0, 3), torch.float32,
    ]  # fmt: skip
    assert len({checksum(value) for value in others}) == len(others)
    altered = copy.deepcopy(state)
    altered._metadata[""]["version"] = 1
    assert checksum(altered) != checksum(state)
    for value in others:
        write_tensors(value, tmp_path / "file.pt")
        assert checksum(read_tensors(tmp_path / "file.pt")) == checksum(value)
