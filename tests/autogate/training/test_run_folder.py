"""What the folder of a run holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import autogate
from autogate.training import Budget, RunFolder, start
from autogate.training.data import find_data, loaders, on_device
from autogate.training.distributed import World
from autogate.training.learning import accuracy
from tests.autogate.training.runs import Diary, recipe


def test_the_folder_holds_the_run(plain: tuple[RunFolder, Diary], pictures: Path):
    folder, diary = plain
    info, rows, gates, result = folder.info(), folder.metrics(), folder.gates(), folder.result()
    assert info.recipe == recipe(pictures)
    assert (info.num_classes, info.input_size, info.train_images, info.val_images) == (3, (3, 32, 32), 24, 15)
    assert (info.batches, info.steps_per_epoch, info.steps, info.targets) == (3, 3, 6, {"FLOPs": 0.7})
    assert [(row.epoch, row.step) for row in rows] == [(0, 0), (1, 3), (2, 6)]
    assert list(rows) == diary.rows and diary.ended == 1
    assert rows[0].flops == rows[0].params == 1 and rows[0].live == rows[0].gates == info.gates
    assert rows[-1].flops <= 0.71 and rows[-1].settled and rows[-1].live < info.gates
    for row, line in zip(rows, gates, strict=True):
        assert line.dead + sum(line.histogram) == info.gates and line.dead == info.gates - row.live
    assert gates[0].outputs == tuple(layer.outputs for layer in info.layers)
    slim = autogate.load(folder.slim_file)
    widths = {name: module for name, module in slim.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for layer, inputs, outputs in zip(info.layers, gates[-1].inputs, gates[-1].outputs, strict=True):
        assert tuple(widths[layer.module].weight.shape[:2]) == (outputs, inputs)
    assert result is not None and result.step == result.steps == 6
    assert result.accuracy == rows[-1].accuracy
    assert result.flops == pytest.approx(rows[-1].flops * info.flops)
    assert result.params == sum(p.numel() for p in slim.parameters())
    assert not slim.training


def test_the_accuracies_are_those_of_the_models(plain: tuple[RunFolder, Diary], pictures: Path):
    folder, _ = plain
    slim, data = autogate.load(folder.slim_file), find_data(folder.info().recipe.images)
    from timm.data import resolve_data_config

    val = loaders(data, folder.info().recipe.images, resolve_data_config({"img_size": 32}, model=slim), World()).val
    right, seen = accuracy(slim, on_device(val, torch.device("cpu")))
    assert seen == 15 and 100 * right / seen == folder.result().accuracy


def test_a_row_that_was_cut_short_is_written_anew(plain: tuple[RunFolder, Diary], tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.create(plain[0].info())
    rows, gates = plain[0].metrics(), plain[0].gates()
    for row, line in zip(rows, gates, strict=True):
        folder.add(row, line)
    for file in (folder.metrics_file, folder.gates_file):
        file.write_text(file.read_text()[:-10])
    folder.rewind(2)
    folder.add(rows[2], gates[2])
    assert (folder.metrics(), folder.gates()) == (rows, gates)


def test_a_folder_in_use_is_left_alone(plain: tuple[RunFolder, Diary], pictures: Path, tmp_path: Path):
    with pytest.raises(autogate.AutogateError, match=r"already a run in this folder.*--resume"):
        start(recipe(pictures), plain[0].path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(autogate.AutogateError, match="not an empty folder"):
        start(recipe(pictures), tmp_path)


def test_a_target_out_of_reach_leaves_no_folder(pictures: Path, tmp_path: Path):
    with pytest.raises(autogate.AutogateError, match=r"0.050 of the FLOPs can't be reached"):
        start(recipe(pictures, budget=Budget(flops=0.05, ignore=("layer3", "layer4"))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_older_folder_is_read_by_its_format(plain: tuple[RunFolder, Diary], tmp_path: Path):
    content = json.loads(plain[0].info_file.read_text())
    (tmp_path / "run.json").write_text(json.dumps({**content, "format": 0}))
    with pytest.raises(autogate.AutogateError, match=r"run\.json: its format can't be read"):
        RunFolder(tmp_path).info()
