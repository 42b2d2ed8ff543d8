"""A training run: what its folder holds, and that one that stopped goes on as if it had not."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import autogate
from autogate.training import (
    Budget,
    Callback,
    Distillation,
    EpochRow,
    Images,
    Learning,
    Network,
    Recipe,
    RunFolder,
    StepMetrics,
    finalize_checkpoint,
    loop,
    resume,
    start,
)
from autogate.training.callbacks import TensorBoard
from autogate.training.checkpoint import load_checkpoint
from autogate.training.data import find_data, loaders, on_device
from autogate.training.distributed import World
from autogate.training.learning import Loss, accuracy, distance
from autogate.training.tensor_files import read_tensors, write_tensors
from tests.autogate.conftest import paint


def recipe(pictures: Path, **changes: Any) -> Recipe:
    """Two epochs of three steps of a small network."""
    plain: dict[str, Any] = {
        "network": Network("test_resnet", img_size=32),
        "images": Images(str(pictures), batch_size=8, workers=0),
        "budget": Budget(flops=0.7),
        "learning": Learning(epochs=2),
        "device": "cpu",
    }
    return Recipe(**{**plain, **changes})


class Diary(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[EpochRow] = []
        self.moments: list[StepMetrics] = []
        self.ended = 0

    def stepped(self, metrics: StepMetrics) -> None:
        self.moments.append(metrics)

    def evaluated(self, row: EpochRow) -> None:
        self.rows.append(row)

    def finished(self) -> None:
        self.ended += 1


class After(Callback):
    """Stops a run after so many steps."""

    def __init__(self, steps: int):
        self.left, self.training = steps, False

    def evaluated(self, row: EpochRow) -> None:
        self.training = True

    def __call__(self) -> bool:
        self.left -= self.training
        return self.left <= 0


@pytest.fixture(scope="module")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Diary]:
    """A run that was never stopped."""
    folder, diary = tmp_path_factory.mktemp("runs") / "plain", Diary()
    assert start(recipe(pictures), folder, callbacks=[diary]) is not None
    return RunFolder(folder), diary


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


def everything(images: Images) -> dict[str, Any]:
    """A run of all that a checkpoint has to know of."""
    return {
        "images": dataclasses.replace(images, batch_size=4, mixup=0.5, cutmix=0.5),
        "network": Network("test_resnet", img_size=32, drop=0.2, drop_path=0.1),
        "learning": Learning(
            epochs=2, opt="adamw", lr=1e-3, warmup_epochs=1, grad_accum_steps=2, clip_grad=1.0, smoothing=0.1,
            amp=True, model_ema=True,
        ),
        "distillation": Distillation(0.5, 3.0),
    }  # fmt: skip


@pytest.mark.parametrize(("workers", "steps"), [(0, 2), (1, 1)])
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


class InEpoch(Callback):
    """Stops a run after the first step of an epoch."""

    def __init__(self, epoch: int):
        self.epoch, self.now = epoch, -1

    def evaluated(self, row: EpochRow) -> None:
        self.now = row.epoch + 1

    def __call__(self) -> bool:
        return self.now == self.epoch


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


def test_a_finished_run_is_told_again(plain: tuple[RunFolder, Diary]):
    folder, _ = plain
    before = folder.slim_file.stat().st_mtime_ns
    assert resume(folder.path) == folder.result()
    assert folder.slim_file.stat().st_mtime_ns == before


def test_a_finished_run_keeps_its_accuracy(plain: tuple[RunFolder, Diary]):
    folder, _ = plain
    before = folder.result()
    assert finalize_checkpoint(folder.path).result == before == folder.result()


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


def test_a_run_is_not_gone_on_with_on_other_data(pictures: Path, tmp_path: Path):
    stop = After(1)
    assert start(recipe(pictures), tmp_path / "run", callbacks=[stop], stop=stop) is None
    other = paint(tmp_path / "other", {"train": 9, "validation": 5})
    change = lambda asked: dataclasses.replace(asked, images=dataclasses.replace(asked.images, data=str(other)))  # noqa: E731
    with pytest.raises(autogate.AutogateError, match="train images: there are 27 now, and there were 24"):
        resume(tmp_path / "run", change=change)
    with pytest.raises(autogate.AutogateError, match="there are 2 processes now, and there were 1"):
        resume(tmp_path / "run", world=World(size=2))


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


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "last.pt"
    write_tensors({"step": 1}, file)

    def full(value: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(autogate.AutogateError, match=r"could not be written .*is unchanged"):
        write_tensors({"step": 2}, file)
    assert read_tensors(file) == {"step": 1} and list(tmp_path.iterdir()) == [file]


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


def test_a_loss_that_is_not_finite_ends_the_run(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop.Loss, "__call__", lambda self, model, images, labels: model(images).sum() * torch.inf)
    with pytest.raises(autogate.AutogateError, match="no longer finite at step"):
        start(recipe(pictures), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.pt").position.step == 0  # the good one stays


def test_distillation_is_the_kl_divergence():
    torch.manual_seed(0)
    logits, wanted = torch.randn(2, 4, 5).double().unbind(0)
    student, teacher = (logits / 3).softmax(1), (wanted / 3).softmax(1)
    divergence = (teacher * (teacher.log() - student.log())).sum(1).mean()
    assert distance(logits, wanted, 3.0).item() == pytest.approx(9 * divergence.item(), rel=1e-5)


def test_the_teacher_has_its_part_of_the_loss():
    torch.manual_seed(0)
    model, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    images, labels = torch.randn(6, 4), torch.randint(3, (6,))
    plain = F.cross_entropy(model(images), labels)
    asked = Recipe(Network("test_resnet"), Images("cifar10"), distillation=Distillation(0.25, 2.0))
    loss = Loss.of(asked, 3, teacher)
    got = loss(model, images, labels)
    assert got.item() == pytest.approx((0.75 * plain + 0.25 * distance(model(images), teacher(images), 2.0)).item())
    got.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert teacher[1].num_batches_tracked == 0 and not teacher.training


def test_tensorboard_is_told_too(plain: tuple[RunFolder, Diary], tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = plain
    board = TensorBoard(tmp_path)
    board.started(folder.info(), 0)
    board.stepped(StepMetrics(1, 2, 0.5, 0.1, 0.9, 600))
    for row in folder.metrics():
        board.evaluated(row)
    board.finished()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("epoch/accuracy")] == [0, 3, 6]
    assert read.Scalars("step/loss")[0].value == 0.5
    assert "epoch/train_loss" in read.Tags()["scalars"] and "epoch/ema_accuracy" not in read.Tags()["scalars"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Learning(opt="adamq"), "Known names are adam"),
        (lambda: Learning(sched="cosin"), "cosine"),
        (lambda: Learning(epochs=2, warmup_epochs=2), "warm-up"),
        (lambda: Budget(flops=1.5), r"in \(0, 1\]"),
        (lambda: Distillation(weight=0.0), "weight"),
        (lambda: Recipe(Network("x"), Images("y", batch_size=3, mixup=1.0)), "even batch"),
    ],
)
def test_what_can_not_be_asked_for(make: Any, told: str):
    with pytest.raises(autogate.AutogateError, match=told):
        make()


def test_an_older_folder_is_read_by_its_format(plain: tuple[RunFolder, Diary], tmp_path: Path):
    content = json.loads(plain[0].info_file.read_text())
    (tmp_path / "run.json").write_text(json.dumps({**content, "format": 0}))
    with pytest.raises(autogate.AutogateError, match=r"run\.json: its format can't be read"):
        RunFolder(tmp_path).info()
