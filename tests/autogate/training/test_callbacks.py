"""What TensorBoard is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from autogate.training import RunFolder, StepMetrics
from autogate.training.callbacks import TensorBoard
from tests.autogate.training.runs import Diary


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
