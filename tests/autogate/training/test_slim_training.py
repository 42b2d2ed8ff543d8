"""Channels are removed during training, once the targets are met."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autogate.training import Budget, Images, Learning, RunFolder, finalize_checkpoint, loop, resume, start
from autogate.training.checkpoint import load_checkpoint
from tests.autogate.training.runs import After, Diary, InEpoch, everything, recipe


@pytest.fixture(scope="module")
def slim_early(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of four epochs whose targets are met before the last two."""
    folder, diary = RunFolder(tmp_path_factory.mktemp("runs") / "early"), Diary()
    changes = everything(Images(str(pictures), workers=0))
    learning = dataclasses.replace(changes["learning"], epochs=4, amp=False)
    start(recipe(pictures, **{**changes, "learning": learning}), folder.path, callbacks=[diary])
    (metrics,), row = diary.moments, diary.rows[-1]
    assert metrics.step == 10 and (metrics.flops, metrics.live) == (row.flops, row.live)
    return folder


def test_channels_are_taken_out_once_the_targets_are_met(slim_early: RunFolder):
    rows, found = slim_early.metrics(), load_checkpoint(slim_early.checkpoint_file)
    assert rows[2].settled and len({(row.flops, row.params, row.live) for row in rows[2:]}) == 1
    assert len({dataclasses.replace(row, epoch=0, step=0) for row in slim_early.gates()[2:]}) == 1
    slim = load_file(slim_early.slim_file)
    assert found.gates is not None and found.ema is not None and set(found.model) == set(found.ema) == set(slim)
    assert all(torch.equal(slim[name], value) for name, value in found.ema.items())
    assert any(not torch.equal(slim[name], value) for name, value in found.model.items())


@pytest.mark.slow
def test_it_comes_to_what_gates_to_the_end_come_to(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No dropout here, which draws a number for each channel, and no limit of the gradients' norm."""
    asks = recipe(pictures, learning=Learning(epochs=4, model_ema=True))
    slim, gated = RunFolder(tmp_path / "slim"), RunFolder(tmp_path / "gated")
    start(asks, slim.path)
    monkeypatch.setattr(loop.Loop, "_may_finalize", lambda self: False)
    start(asks, gated.path)
    assert load_checkpoint(slim.checkpoint_file).gates is not None
    assert load_checkpoint(gated.checkpoint_file).gates is None
    for row, other in zip(slim.metrics(), gated.metrics(), strict=True):
        assert (row.flops, row.params, row.live, row.lr) == (other.flops, other.params, other.live, other.lr)
        assert (row.train_loss or 0) == pytest.approx(other.train_loss or 0, rel=1e-5)
    expected = load_file(gated.slim_file)
    for name, value in load_file(slim.slim_file).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert slim.result() == gated.result()


def test_channels_wait_for_the_end_of_an_epoch_that_was_stopped(pictures: Path, tmp_path: Path):
    """Its rest is trained with gates, as it would have been."""
    images = Images(str(pictures), batch_size=2, workers=0)
    asks = recipe(pictures, images=images, budget=Budget(flops=0.97), learning=Learning(epochs=2))
    whole, parts, stop = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts"), After(10)
    assert start(asks, whole.path) is not None
    assert start(asks, parts.path, callbacks=[stop], stop=stop) is None
    found = load_checkpoint(parts.checkpoint_file)
    assert found.gates is None and found.model["autogate.settled"] > 0 and found.position.batch == 10
    assert resume(parts.path, stop=lambda: True) is None  # a step more
    assert load_checkpoint(parts.checkpoint_file).gates is None
    assert resume(parts.path) == whole.result()
    first, second = load_file(whole.slim_file), load_file(parts.slim_file)
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_a_run_goes_on_where_it_was_slim(slim_early: RunFolder, tmp_path: Path):
    folder, stop = RunFolder(tmp_path / "run"), InEpoch(4)
    assert start(slim_early.info().recipe, folder.path, callbacks=[stop], stop=stop) is None
    found = load_checkpoint(folder.checkpoint_file)
    assert found.gates is not None and found.position.batch
    early = finalize_checkpoint(folder.path, tmp_path / "now.safetensors").result
    assert early == dataclasses.replace(slim_early.result(), step=found.position.step, accuracy=None)
    now = load_file(tmp_path / "now.safetensors")
    assert all(torch.equal(now[name], value) for name, value in found.ema.items())
    assert resume(folder.path) == slim_early.result()
    slim = load_file(slim_early.slim_file)
    assert all(torch.equal(slim[name], value) for name, value in load_file(folder.slim_file).items())
    assert folder.gates_file.read_text() == slim_early.gates_file.read_text()


def test_it_goes_on_with_convolutions_on_shortcuts(pictures: Path, tmp_path: Path):
    """Whether one is kept depends on its weights, which a model that is built again doesn't have yet."""
    asks = recipe(pictures, budget=Budget(flops=0.7, shortcuts="conv"), learning=Learning(epochs=4, model_ema=True))
    folder, stop = RunFolder(tmp_path / "run"), InEpoch(4)
    assert start(asks, folder.path, callbacks=[stop], stop=stop) is None
    found = load_checkpoint(folder.checkpoint_file)
    assert found.gates is not None and any("shortcut_conv.weight" in name for name in found.model)
    finalize_checkpoint(folder.path, tmp_path / "now.safetensors")
    now = load_file(tmp_path / "now.safetensors")
    assert all(torch.equal(now[name], value) for name, value in found.ema.items())
    assert resume(folder.path) is not None
