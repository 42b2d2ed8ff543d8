"""A run that was stopped resumes as if it had not been."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import autogate
from autogate.training import Callback, EpochRow, Images, Learning, Recipe, RunFolder, resume, start
from autogate.training.checkpoint import load_checkpoint
from autogate.training.distributed import World
from tests.autogate.conftest import paint
from tests.autogate.training.runs import After, Diary, InEpoch, everything, recipe


@pytest.mark.parametrize(("workers", "steps"), [(0, 2), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_with_the_same_bits(pictures: Path, tmp_path: Path, workers: int, steps: int):
    """Stopped in the middle of an epoch, and killed later on."""

    class Killed(Callback):
        def evaluated(self, row: EpochRow) -> None:
            if row.epoch == 1:
                raise KeyboardInterrupt

    images = Images(str(pictures), batch_size=8, workers=workers)
    half = {"images": images, "learning": Learning(epochs=2, amp=True, amp_dtype="float16")}
    asks = recipe(pictures, **(half if workers else everything(images)))
    whole, parts, stop = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts"), After(steps)
    assert start(asks, whole.path) is not None
    assert start(asks, parts.path, callbacks=[stop], stop=stop) is None
    position = load_checkpoint(parts.checkpoint_file).position
    assert position.epoch == 1 and 0 < position.batch < parts.info().batches
    with pytest.raises(KeyboardInterrupt):
        resume(parts.path, callbacks=[Killed()])
    result = resume(parts.path)
    assert result == whole.result() and result.step == result.steps
    first, second = (load_checkpoint(folder.checkpoint_file) for folder in (whole, parts))
    slim = load_file(whole.slim_file), load_file(parts.slim_file)
    assert first.scaler == second.scaler and (first.scaler is None) == (workers == 0)
    for one, other in ((first.model, second.model), (first.ema or {}, second.ema or {}), slim):
        assert all(torch.equal(one[name], other[name]) for name in one) and len(one) == len(other)
    assert whole.gates_file.read_text() == parts.gates_file.read_text()
    for one, other in zip(whole.metrics(), parts.metrics(), strict=True):
        assert dataclasses.replace(one, seconds=None) == dataclasses.replace(other, seconds=None)


def test_a_finished_run_is_told_again(plain: tuple[RunFolder, Diary]):
    folder, _ = plain
    before = folder.slim_file.stat().st_mtime_ns
    assert resume(folder.path) == folder.result()
    assert folder.slim_file.stat().st_mtime_ns == before


def test_a_run_is_not_gone_on_with_on_other_data(pictures: Path, tmp_path: Path):
    stop = After(1)
    assert start(recipe(pictures), tmp_path / "run", callbacks=[stop], stop=stop) is None
    other = paint(tmp_path / "other", {"train": 9, "validation": 5})
    change = lambda asked: dataclasses.replace(asked, images=dataclasses.replace(asked.images, data=str(other)))  # noqa: E731
    with pytest.raises(autogate.AutogateError, match="train images: there are 27 now, and there were 24"):
        resume(tmp_path / "run", change=change)
    with pytest.raises(autogate.AutogateError, match="there are 2 processes now, and there were 1"):
        resume(tmp_path / "run", world=World(size=2))


@pytest.mark.parametrize(("batch", "met"), [(8, True), (24, False)])  # one step is too short for any target
@pytest.mark.filterwarnings("ignore::autogate.BudgetNotMetWarning")
def test_a_finished_run_goes_on_longer(pictures: Path, tmp_path: Path, batch: int, met: bool):
    """Stopped on the way, too: the run is the longer one from then on."""
    images, folder = Images(str(pictures), batch_size=batch, workers=0), RunFolder(tmp_path / "run")
    first = start(recipe(pictures, images=images, learning=Learning(epochs=1)), folder.path)
    per_epoch, told, stop = folder.info().steps, folder.metrics(), InEpoch(5)
    assert first is not None and (first.shares["FLOPs"] <= 0.7) == met
    assert resume(folder.path, change=epochs(8), callbacks=[stop], stop=stop) is None
    assert folder.info().recipe.learning.epochs == 8 and folder.result() == first
    result = resume(folder.path)
    assert result is not None and result.complete and result.steps == 8 * per_epoch and result.shares["FLOPs"] <= 0.7
    assert folder.result() == result == resume(folder.path)
    rows = folder.metrics()
    assert rows[:2] == (told[0], dataclasses.replace(told[1], settled=met)) and [row.epoch for row in rows] == list(
        range(9)
    )
    for row in rows[2:]:  # the cosine of eight epochs
        assert row.lr == pytest.approx(0.01 * (1 + math.cos(math.pi * (row.step - 1) / (8 * per_epoch))))
    sizes = [gates.outputs for gates in folder.gates()]
    assert (sizes[1] == sizes[-1]) == met


def test_a_run_is_not_made_shorter(plain: tuple[RunFolder, Diary]):
    with pytest.raises(autogate.AutogateError, match="epochs=1 is fewer than the 2 of the run"):
        resume(plain[0].path, change=epochs(1))


def epochs(count: int) -> Callable[[Recipe], Recipe]:
    """Changes the epochs of a recipe."""
    return lambda asked: dataclasses.replace(asked, learning=dataclasses.replace(asked.learning, epochs=count))
