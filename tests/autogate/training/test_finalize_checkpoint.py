"""Finalizing from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

import autogate
from autogate.training import Learning, RunFolder, finalize_checkpoint, resume, start
from tests.autogate.training.runs import After, Diary, recipe


def test_a_finished_run_keeps_its_accuracy(plain: tuple[RunFolder, Diary]):
    folder, _ = plain
    before = folder.result()
    assert finalize_checkpoint(folder.path).result == before == folder.result()


def test_a_run_that_was_not_finished_is_finalized(plain: tuple[RunFolder, Diary], pictures: Path, tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    stop = After(1)
    asks = recipe(pictures, learning=Learning(epochs=4))
    assert start(asks, folder.path, callbacks=[stop], stop=stop) is None
    with pytest.warns(
        autogate.BudgetNotMetWarning, match=r"after 1 of 12 steps: .*% of the FLOPs are left, the target is 70\.0%"
    ):
        found = finalize_checkpoint(folder.path)
    assert found.file == folder.slim_file and folder.result() == found.result
    assert found.result.accuracy is None and (found.result.step, found.result.steps) == (1, 12)
    out = tmp_path / "elsewhere.safetensors"
    with pytest.warns(autogate.BudgetNotMetWarning):
        assert finalize_checkpoint(folder.checkpoint_file, out).file == out
    autogate.load(out)
    assert resume(folder.path).step == 12
