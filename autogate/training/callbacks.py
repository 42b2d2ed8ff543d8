"""Who wants to know how a run goes: a progress bar, a log for TensorBoard."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path

from autogate.training.run_folder import EpochRow, RunInfo
from rewriters import AutogateError


@dataclass(frozen=True)
class StepMetrics:
    """A run between two steps.

    Attributes:
        epoch: that is being trained, from 1 up.
        step: steps taken in all.
        loss: mean of the epoch so far, in this process.
        lr: learning rate.
        flops: share of the FLOPs that is left.
        live: gates that are alive.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    flops: float
    live: int


class Callback:
    """Is told how a run goes, in the main process; this one doesn't care."""

    def started(self, info: RunInfo, step: int) -> None:
        """Training begins, or goes on after `step` steps."""

    def stepped(self, metrics: StepMetrics) -> None:
        """Some steps have been taken."""

    def evaluated(self, row: EpochRow) -> None:
        """An epoch is over, its accuracy known."""

    def finished(self) -> None:
        """No more will come."""


class TensorBoard(Callback):
    """Writes what it is told for TensorBoard.

    Args:
        folder: for its files.

    Raises:
        AutogateError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path):
        if importlib.util.find_spec("tensorboard") is None:
            raise AutogateError("TensorBoard is not installed.", remedy="pip install tensorboard, or leave it out.")
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
