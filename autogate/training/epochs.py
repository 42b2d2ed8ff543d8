"""The epochs of a run: batches, optimizer steps, checkpoints and evaluations, whatever it is that trains.

One checkpoint is written before each evaluation, so an interrupted evaluation is done again. After every step all
processes are asked together whether to stop (a sum over gloo, on the CPU), because a process that stopped alone would
leave the others waiting. A resumed epoch loads the batches that are done again, because loader workers draw from
generators of their own.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autogate.training.callbacks import Callback, StepMetrics
from autogate.training.checkpoint import Checkpoint, Position, save_checkpoint
from autogate.training.data import Loaders, on_device, set_epoch
from autogate.training.distributed import World
from autogate.training.learning import Loss, Stepper, accuracy, seed_at
from autogate.training.recipe import Recipe
from autogate.training.run_folder import EpochRow, Result, RunFolder, RunInfo
from rewriters import AutogateError

TELL_EVERY = 10
"""Steps between two calls of the callbacks: reading the loss makes the host wait for a GPU."""

Stop = Callable[[], bool]
"""Whether the run should write a checkpoint and stop. Called after every step."""


class Stopped(Exception):
    """The run was asked to stop, and has written its checkpoint."""


@dataclass
class Epochs(ABC):
    """A run in memory.

    Attributes:
        model: the model that is trained.
    """

    recipe: Recipe
    info: RunInfo
    folder: RunFolder
    world: World
    loaders: Loaders
    model: nn.Module
    stepper: Stepper
    loss: Loss

    @property
    def average(self) -> nn.Module | None:
        """The model with averaged weights, if weights are averaged."""
        return None if self.stepper.ema is None else self.stepper.ema.module

    def load(self, found: Checkpoint) -> None:
        """Load the state of a checkpoint.

        Raises:
            AutogateError: it is of another run.
        """
        try:
            self.load_parts(found)
        except (RuntimeError, ValueError, KeyError) as error:
            raise misfit(self.folder, error) from error
        self.stepper.schedule_to(found.position.step)

    def before_epoch(self) -> bool:
        """Called before an epoch's first step. Returns whether the model has other parameters now."""
        return False

    @abstractmethod
    def metrics(self, epoch: int, step: int, loss: float, lr: float) -> StepMetrics:
        """What callbacks are told of a step."""

    @abstractmethod
    def checkpoint(self, position: Position) -> Checkpoint:
        """All that resuming needs."""

    @abstractmethod
    def evaluate(self, position: Position, stop: Stop) -> EpochRow:
        """Evaluate the run. The main process writes the result to the run's folder."""

    @abstractmethod
    def finish(self, row: EpochRow) -> Result:
        """Make and save what the run is for."""

    def states(self) -> tuple[Any, Any, Any, Any]:
        """The state of the model, the optimizer, the scaler and the average, for a checkpoint."""
        scaler = self.stepper.scaler
        return (
            self.model.state_dict(),
            self.stepper.optimizer.state_dict(),
            scaler.state_dict() if scaler.is_enabled() else None,
            None if self.average is None else self.average.state_dict(),
        )

    def load_parts(self, found: Checkpoint) -> None:
        """Load the state of the model, the optimizer, the scaler and the average."""
        self.model.load_state_dict(found.model)
        self.stepper.optimizer.load_state_dict(dict(found.optimizer))
        if found.scaler is not None:
            self.stepper.scaler.load_state_dict(dict(found.scaler))
        if self.average is not None and found.ema is not None:
            self.average.load_state_dict(found.ema)

    def run(self, position: Position, callbacks: Sequence[Callback], stop: Stop) -> Result | None:
        """Train the remaining epochs and finalize. None if the run was stopped."""
        callbacks = callbacks if self.world.main else ()
        wrapped = self.world.wrap(self.model)
        for callback in callbacks:
            callback.started(self.info, position.step)
        try:
            for epoch in range(position.epoch, self.recipe.learning.epochs + 1):
                if epoch > position.epoch:
                    position = Position(epoch, step=position.step)
                if epoch and not position.batch and self.before_epoch():
                    wrapped = self.world.wrap(self.model)
                if epoch and position.batch < self.info.batches:
                    position = self._train(wrapped, position, callbacks, stop)
                self._save(position)
                row = self._evaluated(position, stop)
                for callback in callbacks:
                    callback.evaluated(row)
            return self.finish(row)
        except Stopped:
            return None
        finally:
            for callback in callbacks:
                callback.finished()

    def _train(self, wrapped: nn.Module, position: Position, callbacks: Sequence[Callback], stop: Stop) -> Position:
        """Train the rest of an epoch, and return the position at its end."""
        world, stepper, epoch, step, lr = self.world, self.stepper, position.epoch, position.step, position.lr
        began = time.monotonic() - position.seconds
        total = torch.tensor(position.loss / world.size, device=world.device)
        done = position.batch
        wrapped.train()

        def here() -> Position:
            loss = float(world.total(total))
            self._check_finite(loss, step)
            return Position(epoch, done, step, loss, time.monotonic() - began, lr)

        for images, labels in self._batches(position):
            group = self._group(done)
            last = done + 1 == group.stop
            alone = contextlib.nullcontext() if last or world.size == 1 else wrapped.no_sync()  # type: ignore[operator]
            with alone:
                total += self.backward(wrapped, images, labels, len(group), (epoch, done))
            done += 1
            if not last:
                continue
            step += 1
            lr = stepper.step(self.model, step)
            if callbacks and step % TELL_EVERY == 0:
                mean = float(total) / done
                self._check_finite(mean, step)
                told = self.metrics(epoch, step, mean, lr)
                for callback in callbacks:
                    callback.stepped(told)
            if world.any(stop()):
                self._save(here())
                raise Stopped
        done = self.info.batches
        return here()

    def backward(
        self, wrapped: nn.Module, images: Tensor, labels: Tensor, parts: int, place: tuple[int, int]
    ) -> Tensor:  # fmt: skip
        """Add the gradients of a batch, which is one of `parts` of a step. Returns its loss.

        Args:
            wrapped: the model, wrapped for several processes.
            images: shape (N, C, H, W).
            labels: shape (N,).
            parts: the number of batches whose gradients are accumulated.
            place: the epoch, and the batch within it.
        """
        with self.stepper.autocast():
            loss = self.loss(wrapped, images, labels)
        self.stepper.backward(loss / parts)
        return loss.detach()

    def _batches(self, position: Position) -> Iterator[tuple[Tensor, Tensor]]:
        """The remaining batches of an epoch. Those before are loaded too, to draw the same random numbers."""
        place = (self.recipe.seed, self.world.rank, position.epoch)
        seed_at(*place, 0)
        set_epoch(self.loaders.train, position.epoch)
        batches = iter(on_device(self.loaders.train, self.world.device))
        for index in range(self.info.batches):
            seed_at(*place, index + 1)
            batch = next(batches, None)
            if batch is None:
                return
            if index >= position.batch:
                yield batch

    def _group(self, batch: int) -> range:
        """The batches whose gradients are accumulated into the same step as those of `batch`."""
        size = self.recipe.learning.grad_accum_steps
        first = batch - batch % size
        return range(first, min(first + size, self.info.batches))

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise AutogateError(
                f"the loss is no longer finite at step {step}.",
                where=str(self.folder.path),
                remedy="Start a new run in another folder, with a smaller --lr, with --clip-grad or without --amp.",
            )

    def _save(self, position: Position) -> None:
        if self.world.main:
            save_checkpoint(self.checkpoint(position), self.folder.checkpoint_file)

    def _evaluated(self, position: Position, stop: Stop) -> EpochRow:
        row = self.evaluate(position, stop)
        if self.world.any(stop()):
            raise Stopped
        return row

    def mean_loss(self, position: Position) -> float | None:
        """The mean loss of the epoch that has ended; None before the first one."""
        batches = max(position.batch, 1) * self.world.size
        return position.loss / batches if position.epoch else None

    def row(self, position: Position, **measured: Any) -> EpochRow:
        """The row of the epoch that has ended, with what was measured at its end."""
        seconds = round(position.seconds, 3) if position.epoch else None
        return EpochRow(
            epoch=position.epoch, step=position.step, lr=position.lr, train_loss=self.mean_loss(position),
            seconds=seconds, **measured,
        )  # fmt: skip

    def accuracy(self, model: nn.Module, stop: Stop) -> float:
        """Accuracy on the validation images, in percent."""

        def check() -> None:
            if self.world.size == 1 and stop():
                raise Stopped

        with self.stepper.autocast():
            batches = on_device(self.loaders.val, self.world.device)
            counts = accuracy(model, batches, self.loaders.val_share, check)
        right, seen = self.world.total(torch.tensor(counts)).tolist()
        return 100 * right / max(seen, 1)


def misfit(folder: RunFolder, error: Exception) -> AutogateError:
    """The error for a checkpoint that doesn't fit."""
    return AutogateError(f"the checkpoint doesn't fit the run: {error}", where=str(folder.checkpoint_file))
