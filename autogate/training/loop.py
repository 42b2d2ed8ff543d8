"""The training loop: the epochs of one run, its checkpoints and evaluations, and the slim model at the end.

The loop treats gates as any other loop does: the model is prepared before it, and finalized between two epochs once the
targets are met, or else at the end. One checkpoint is written before each evaluation, so an interrupted evaluation is
done again. After every step all processes are asked together whether to stop (a sum over gloo, on the CPU), because a
process that stopped alone would leave the others waiting. A resumed epoch loads the batches that are done again,
because loader workers draw from generators of their own.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import timm
import torch
from torch import Tensor, nn

from autogate.api import gates, summary
from autogate.budget import Flops
from autogate.files import save
from autogate.inspection import Summary
from autogate.training.callbacks import Callback, StepMetrics
from autogate.training.checkpoint import Checkpoint, Position, save_checkpoint
from autogate.training.data import DataSets, Loaders, loaders, on_device, set_epoch
from autogate.training.distributed import World
from autogate.training.finalize_run import FinalGates, Snapshot, finalize_run, finalize_run_again
from autogate.training.learning import Loss, Stepper, accuracy, seed_at
from autogate.training.network import data_config, note_data_config, outputs_of, with_gates
from autogate.training.recipe import Recipe
from autogate.training.run_folder import EpochRow, LayerSize, Result, RunFolder, RunInfo
from autogate.version import __version__
from rewriters import AutogateError

TELL_EVERY = 10
"""Steps between two calls of the callbacks: reading the loss makes the host wait for a GPU."""

Stop = Callable[[], bool]
"""Whether the run should write a checkpoint and stop. Called after every step."""


class _Stopped(Exception):
    """The run was asked to stop, and has written its checkpoint."""


@dataclass
class Loop:
    """A run in memory.

    Attributes:
        model: the model; with gates until the targets are met, slim afterwards.
        final_gates: the gates when the model was finalized; None while it has gates.
    """

    recipe: Recipe
    info: RunInfo
    folder: RunFolder
    world: World
    loaders: Loaders
    model: nn.Module
    stepper: Stepper
    loss: Loss
    flops: Flops
    final_gates: FinalGates | None = None

    @classmethod
    def prepare(
        cls, recipe: Recipe, data: DataSets, model: nn.Module, teacher: nn.Module | None, folder: RunFolder,
        world: World,
    ) -> Loop:  # fmt: skip
        """Prepare a model, and everything else for a run that has not started."""
        config = data_config(model, recipe.network)
        classes = outputs_of(model, tuple(config["input_size"]))
        if data.num_classes is not None and classes < data.num_classes:
            raise AutogateError(
                f"the model has {classes} outputs, but the data has {data.num_classes} classes.",
                where="num_classes",
                remedy="Omit --num-classes, or give at least as many as the data has.",
            )
        note_data_config(model, config, data.class_names or (), classes)
        loading = loaders(data, recipe.images, config, world)
        steps = recipe.learning.epochs * _steps_per_epoch(recipe, loading)
        model = with_gates(model, recipe.budget, tuple(config["input_size"]), steps, recipe.method)
        info = _info(recipe, data, loading, world, summary(model), classes, tuple(config["input_size"]))
        stepper = Stepper(model, recipe.learning, info.steps_per_epoch)
        bank = gates(model)
        flops = Flops(bank.channel_map, model, bank.added)
        return cls(recipe, info, folder, world, loading, model, stepper, Loss.of(recipe, classes, teacher), flops)

    def load(self, found: Checkpoint) -> None:
        """Load the state of a checkpoint."""
        try:
            if found.gates is not None:
                self.final_gates = finalize_run_again(
                    self.model, found.gates, found.slimmings, self._average, self.stepper.optimizer
                )
            self.model.load_state_dict(found.model)
            if self.final_gates is None and found.position.step >= found.info.steps < self.info.steps:
                gates(self.model).settled.zero_()  # the steps were over, and now there are more
            self.stepper.optimizer.load_state_dict(dict(found.optimizer))
            if found.scaler is not None:
                self.stepper.scaler.load_state_dict(dict(found.scaler))
            if self._average is not None and found.ema is not None:
                self._average.load_state_dict(found.ema)
        except (RuntimeError, ValueError, KeyError) as error:
            raise AutogateError(
                f"the checkpoint doesn't fit the run: {error}", where=str(self.folder.checkpoint_file)
            ) from error
        self.stepper.schedule_to(found.position.step)

    @property
    def _average(self) -> nn.Module | None:
        """The model with averaged weights, if weights are averaged."""
        return None if self.stepper.ema is None else self.stepper.ema.module

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
                if epoch and not position.batch and self._may_finalize():
                    self.final_gates = finalize_run(self.model, self._average, self.stepper.optimizer)
                    wrapped = self.world.wrap(self.model)
                if epoch and position.batch < self.info.batches:
                    position = self._train(wrapped, position, callbacks, stop)
                self._save(position)
                row = self._evaluate(position, stop)
                for callback in callbacks:
                    callback.evaluated(row)
            return self._finish(row)
        except _Stopped:
            return None
        finally:
            for callback in callbacks:
                callback.finished()

    def _may_finalize(self) -> bool:
        """Whether the targets are met: the gates have nothing left to learn, and training costs less without them."""
        return self.final_gates is None and gates(self.model).progress().settled

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
            with alone, stepper.autocast():
                loss = self.loss(wrapped, images, labels)
            with alone:
                stepper.backward(loss / len(group))
            total += loss.detach()
            done += 1
            if not last:
                continue
            step += 1
            lr = stepper.step(self.model, step)
            if callbacks and step % TELL_EVERY == 0:
                self._report_step(callbacks, epoch, step, float(total) / done, lr)
            if world.any(stop()):
                self._save(here())
                raise _Stopped
        done = self.info.batches
        return here()

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

    def _report_step(self, callbacks: Sequence[Callback], epoch: int, step: int, loss: float, lr: float) -> None:
        self._check_finite(loss, step)
        if self.final_gates is None:
            live = gates(self.model).live.cpu()
            share, count = self.flops.share(live), int(live.sum())
        else:
            share, count = self.final_gates.snapshot.flops / self.info.flops, self.final_gates.snapshot.live
        metrics = StepMetrics(epoch, step, loss, lr, share, count)
        for callback in callbacks:
            callback.stepped(metrics)

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise AutogateError(
                f"the loss is no longer finite at step {step}.",
                where=str(self.folder.path),
                remedy="Start a new run in another folder, with a smaller --lr, with --clip-grad or without --amp.",
            )

    def _save(self, position: Position) -> None:
        if not self.world.main:
            return
        stepper = self.stepper
        scaler = stepper.scaler.state_dict() if stepper.scaler.is_enabled() else None
        ema = self._average.state_dict() if self._average is not None else None
        final = self.final_gates
        checkpoint = Checkpoint(
            self.info, position, self.model.state_dict(), stepper.optimizer.state_dict(), scaler, ema,
            None if final is None else final.bank_state, () if final is None else final.slimmings,
        )  # fmt: skip
        save_checkpoint(checkpoint, self.folder.checkpoint_file)

    def _evaluate(self, position: Position, stop: Stop) -> EpochRow:
        """Evaluate the run; the main process writes the result to the run folder."""
        now = Snapshot.of(self.model) if self.final_gates is None else self.final_gates.snapshot
        batches = max(position.batch, 1) * self.world.size
        row = EpochRow(
            epoch=position.epoch,
            step=position.step,
            lr=position.lr,
            train_loss=position.loss / batches if position.epoch else None,
            seconds=round(position.seconds, 3) if position.epoch else None,
            accuracy=self._accuracy(self.model, stop),
            ema_accuracy=None if self._average is None else self._accuracy(self._average, stop),
            flops=now.flops / self.info.flops,
            params=now.params / self.info.params,
            live=now.live,
            gates=self.info.gates,
            settled=now.settled,
        )
        if self.world.main:
            self.folder.add(row, now.gate_row(row))
        if self.world.any(stop()):
            raise _Stopped
        return row

    def _accuracy(self, model: nn.Module, stop: Stop) -> float:
        """Accuracy on the validation images, in percent."""

        def check() -> None:
            if self.world.size == 1 and stop():
                raise _Stopped

        with self.stepper.autocast():
            batches = on_device(self.loaders.val, self.world.device)
            counts = accuracy(model, batches, self.loaders.val_share, check)
        right, seen = self.world.total(torch.tensor(counts)).tolist()
        return 100 * right / max(seen, 1)

    def _finish(self, row: EpochRow) -> Result:
        """Finalize the model if it still has gates, evaluate the slim model and save it."""
        if self.final_gates is None:
            self.final_gates = finalize_run(self.model, self._average, warn=self.world.main)
        slim = (self.model if self._average is None else self._average).eval()
        result = replace(
            self.final_gates.snapshot.result(slim, self.info, row.step), accuracy=self._accuracy(slim, lambda: False)
        )
        if self.world.main:
            save(slim, self.folder.slim_file)
            self.folder.finish(result)
        self.world.wait()
        return result


def _steps_per_epoch(recipe: Recipe, loading: Loaders) -> int:
    return math.ceil(len(loading.train) / recipe.learning.grad_accum_steps)


def _info(
    recipe: Recipe, data: DataSets, loading: Loaders, world: World, whole: Summary, classes: int,
    input_size: tuple[int, int, int],
) -> RunInfo:  # fmt: skip
    """The content of run.json: the recipe, and what it means for this model and this data."""
    steps_per_epoch = _steps_per_epoch(recipe, loading)
    assert whole.progress is not None  # of a gated model
    return RunInfo(
        format=1,
        versions={"autogate": __version__, "torch": torch.__version__, "timm": timm.__version__},
        recipe=recipe,
        num_classes=classes,
        class_names=data.class_names or (),
        input_size=input_size,
        train_images=len(data.train),
        val_images=len(data.val),
        processes=world.size,
        batches=len(loading.train),
        steps_per_epoch=steps_per_epoch,
        steps=recipe.learning.epochs * steps_per_epoch,
        gates=whole.progress.classes,
        targets=whole.progress.targets,
        flops=whole.all_flops,
        params=whole.all_params,
        layers=tuple(
            LayerSize(layer.module, layer.all_inputs, layer.all_outputs, layer.all_macs) for layer in whole.layers
        ),
    )
