"""Callbacks that follow a run: the base class, and a log for TensorBoard."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path

from autogate.training.run_folder import EpochRow, RunInfo
from rewriters import AutogateError


@dataclass(frozen=True)
class StepMetrics:
    """A run after one of its steps.

    Attributes:
        epoch: the current epoch, starting from 1.
        step: optimizer steps so far.
        loss: mean loss of the epoch so far, in this process.
        lr: learning rate.
        flops: share of the FLOPs that is left.
        live: number of live gates.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    flops: float
    live: int


class Callback:
    """Called with the progress of a run, in the main process. This base class does nothing."""

    def started(self, info: RunInfo, step: int) -> None:
        """Training starts, or resumes after `step` steps."""

    def stepped(self, metrics: StepMetrics) -> None:
        """Some more steps are done."""

    def evaluated(self, row: EpochRow) -> None:
        """An epoch is done and evaluated."""

    def finished(self) -> None:
        """No more calls will follow."""


class TensorBoard(Callback):
    """Logs a run for TensorBoard.

    Args:
        folder: folder of the log files.

    Raises:
        AutogateError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path):
        if importlib.util.find_spec("tensorboard") is None:
            raise AutogateError("TensorBoard is not installed.", remedy="pip install tensorboard, or train without it.")
        self.folder = folder

    def started(self, info: RunInfo, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)

    def stepped(self, metrics: StepMetrics) -> None:
        for name, value in (
            ("loss", metrics.loss),
            ("lr", metrics.lr),
            ("flops", metrics.flops),
            ("live", metrics.live),
        ):
            self.writer.add_scalar(f"step/{name}", value, metrics.step)

    def evaluated(self, row: EpochRow) -> None:
        for name, value in asdict(row).items():
            if value is not None and name not in ("epoch", "step"):
                self.writer.add_scalar(f"epoch/{name}", value, row.step)

    def finished(self) -> None:
        self.writer.close()
