"""A run of several widths: found, trained together, stopped anywhere, gone on with bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import autogate
from autogate import subnets
from autogate.training import (
    Callback,
    EpochRow,
    Images,
    Learning,
    RunFolder,
    Widths,
    finalize_checkpoint,
    resume,
    start,
)
from autogate.training.checkpoint import load_checkpoint
from rewriters import AutogateError
from tests.autogate.training.runs import After, Diary, everything, recipe


def asked(pictures: Path, **changes):
    widths = Widths((0.3, 0.6), by="l1")
    plain = {"learning": Learning(epochs=2), "subnets": widths}
    return dataclasses.replace(recipe(pictures), **{"budget": autogate.training.Budget(), **plain, **changes})


@pytest.mark.slow
def test_a_run_trains_all_widths_and_saves_one_network(pictures: Path, tmp_path: Path):
    folder, diary = RunFolder(tmp_path / "run"), Diary()
    result = start(asked(pictures), folder.path, callbacks=[diary])
    assert result is not None and result.complete and resume(folder.path) == result
    model = autogate.load(folder.switchable_file)
    rows = subnets.status(model).rows
    sizes = folder.subnet_sizes()
    assert [one.name for one in sizes] == [row.structure.name for row in rows] == ["0.3", "0.6", "full"]
    assert all(one.seconds > 0 and 0 <= one.accuracy <= 100 for one in sizes)
    assert [one.flops for one in sizes] == pytest.approx([row.structure.shares["FLOPs"] for row in rows])
    assert all(len(one.outputs) == len(folder.info().layers) for one in sizes)
    for one, other in itertools.pairwise(sizes):
        assert all(low <= high for low, high in zip(one.outputs, other.outputs, strict=True))
    accuracies = folder.subnets()
    assert [(row.epoch, row.name) for row in accuracies] == [(e, n) for e in range(3) for n in ("0.3", "0.6", "full")]
    assert [row.accuracy for row in folder.metrics()] == [row.accuracy for row in accuracies if row.name == "full"]
    first = load_checkpoint(folder.checkpoint_file).model
    for number in range(2):
        norms = [v for name, v in first.items() if name.startswith(f"autogate_subnets.{number}.") and "mean" in name]
        assert norms and any(norm.abs().max() > 0 for norm in norms)
    assert len(diary.rows) == 3 and diary.moments == []
    before = load_file(folder.switchable_file)
    made = finalize_checkpoint(folder.path)
    assert (made.file, made.result, made.subnets) == (folder.switchable_file, result, ("0.3", "0.6", "full"))
    again = load_file(made.file)
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in again)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["l1", None])
def test_a_stopped_run_goes_on_with_the_same_bits(pictures: Path, tmp_path: Path, by: str | None):
    """Stopped in the middle of an epoch (while channels are looked for, if they are), and killed later on."""

    class Killed(Callback):
        def evaluated(self, row: EpochRow) -> None:
            if row.epoch == 1 and row.gates == 0:
                raise KeyboardInterrupt

    widths = Widths((0.3, 0.6), by=by, rule="sandwich", nested=by is not None)
    parts = everything(Images(str(pictures), batch_size=8, workers=0))
    learning = dataclasses.replace(parts["learning"], opt="sgd", amp=False)
    asks = asked(pictures, **{**parts, "learning": learning, "subnets": widths})
    whole, cut, stop = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut"), After(2)
    assert start(asks, whole.path) is not None
    assert start(asks, cut.path, callbacks=[stop], stop=stop) is None
    stopped = cut if by is not None else cut.of_share(0.3)
    assert load_checkpoint(stopped.checkpoint_file).position.batch > 0
    if by is None:
        with pytest.raises(AutogateError, match=r"aren't found yet\. autogate train --resume"):
            finalize_checkpoint(cut.path)
    else:
        made = finalize_checkpoint(cut.path, tmp_path / "now.safetensors")
        assert made.result.step == 2 and subnets.status(autogate.load(made.file)).rows[0].structure.name == "0.3"
    with pytest.raises(KeyboardInterrupt):
        resume(cut.path, callbacks=[Killed()])
    assert resume(cut.path) == whole.result()
    assert cut.structures() == whole.structures()
    first, second = (load_checkpoint(folder.checkpoint_file) for folder in (whole, cut))
    files = load_file(whole.switchable_file), load_file(cut.switchable_file)
    for one, other in ((first.model, second.model), (first.ema, second.ema), files):
        assert all(torch.equal(one[name], other[name]) for name in one) and len(one) == len(other)
    assert whole.subnets() == cut.subnets()


def test_shares_and_budgets_that_do_not_fit_are_refused(pictures: Path, tmp_path: Path):
    with pytest.raises(AutogateError, match="another budget is given"):
        start(asked(pictures, budget=autogate.training.Budget(flops=0.5)), tmp_path / "run")
    for wrong, message in (
        (lambda: Widths(()), "one share or more"),
        (lambda: Widths((0.5, 1.0)), r"in \(0, 1\)"),
        (lambda: Widths((0.5, 0.2)), "not ascending"),
        (lambda: Widths((0.5,), by="taylor"), "'taylor' is unknown"),
        (lambda: Widths((0.5,), rule="some"), "'some' is unknown"),
    ):
        with pytest.raises(AutogateError, match=message):
            wrong()
