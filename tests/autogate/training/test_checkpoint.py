"""Checkpoint files that are hostile, damaged or only half written."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import autogate
from autogate.training import RunFolder, finalize_checkpoint
from autogate.training.checkpoint import load_checkpoint, save_checkpoint
from autogate.training.tensor_files import read_tensors, write_tensors
from tests.autogate.training.runs import Diary


def test_a_checkpoint_runs_no_code(tmp_path: Path):
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    file = tmp_path / "last.pt"
    torch.save({"model": Hostile()}, file)
    with pytest.raises(autogate.AutogateError, match="damaged, or not a checkpoint"):
        finalize_checkpoint(file)
    file.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(autogate.AutogateError):
        finalize_checkpoint(file)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_is_told(plain: tuple[RunFolder, Diary], tmp_path: Path):
    whole = plain[0].checkpoint_file.read_bytes()
    file = tmp_path / "last.pt"
    for content in (b"", b"nonsense", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(autogate.AutogateError, match="damaged, or not a checkpoint"):
            finalize_checkpoint(file)
    write_tensors({"model": {}}, file)
    with pytest.raises(autogate.AutogateError, match=r"not a checkpoint that this version"):
        finalize_checkpoint(file)
    with pytest.raises(autogate.AutogateError, match=r"no run\.json"):
        finalize_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint(
    plain: tuple[RunFolder, Diary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file, found = tmp_path / "last.pt", load_checkpoint(plain[0].checkpoint_file)
    write_tensors({"step": 1}, file)

    def full(value: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    for write in (lambda: write_tensors({"step": 2}, file), lambda: save_checkpoint(found, file)):
        with pytest.raises(
            autogate.AutogateError, match=r"/last.pt: it could not be written \(.* free on the disk: .*"
        ):
            write()
    assert read_tensors(file) == {"step": 1} and list(tmp_path.iterdir()) == [file]
