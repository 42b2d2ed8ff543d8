"""A run of several widths in one network, whose channels are known: each step trains one subnet after the other."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from torch import Tensor, nn

from autogate import subnets
from autogate.files import data_config_of, save
from autogate.slim import layers_of
from autogate.training.callbacks import StepMetrics
from autogate.training.checkpoint import Checkpoint, Position
from autogate.training.data import DataSets, loaders
from autogate.training.distributed import World
from autogate.training.epochs import Epochs, Stop
from autogate.training.learning import Loss, Stepper, number_at
from autogate.training.loop import config_for, info_of, sizes_of
from autogate.training.network import with_gates
from autogate.training.recipe import Recipe, Widths
from autogate.training.run_folder import EpochRow, Result, RunFolder, RunInfo, SubnetRow, SubnetSize
from rewriters import ChannelMap


@dataclass
class SwitchableLoop(Epochs):
    """A run of a switchable network in memory."""

    widths: Widths

    @classmethod
    def prepare(
        cls, info: RunInfo, data: DataSets, model: nn.Module, found: subnets.Found, channel_map: ChannelMap,
        folder: RunFolder, world: World,
    ) -> SwitchableLoop:  # fmt: skip
        """Make the switchable network, and everything else for a run that has not started."""
        recipe = info.recipe
        assert recipe.subnets is not None
        config, classes = config_for(recipe, data, model)
        loading = loaders(data, recipe.images, config, world)
        model = subnets.fuse(model, found, nested=recipe.subnets.nested)
        if world.main and not folder.subnet_sizes():
            rows = subnets.status(model).rows
            folder.write_subnet_sizes([_size(row.structure, channel_map) for row in rows])
        stepper = Stepper(model, recipe.learning, info.steps_per_epoch)
        loss = Loss.of(recipe, classes, None)
        return cls(recipe, info, folder, world, loading, model, stepper, loss, recipe.subnets)

    def backward(
        self, wrapped: nn.Module, images: Tensor, labels: Tensor, parts: int, place: tuple[int, int]
    ) -> Tensor:  # fmt: skip
        """Add the gradients of all subnets. Returns the largest one's loss."""
        images, labels = self.loss.mixed(images, labels)
        seed = number_at(self.recipe.seed, *place)  # the same in all processes
        of_largest = images.new_zeros(())
        for active in subnets.each(wrapped, self.widths.rule, seed=seed):
            with self.stepper.autocast():
                loss = self.loss.of_outputs(wrapped(images), labels, active.teacher)
            self.stepper.backward(loss / parts)
            if active.teacher is None:
                of_largest = loss.detach()
        return of_largest

    def metrics(self, epoch: int, step: int, loss: float, lr: float) -> StepMetrics:
        return StepMetrics(epoch, step, loss, lr, 1.0, 0)

    def checkpoint(self, position: Position) -> Checkpoint:
        return Checkpoint(self.info, position, *self.states(), None)

    def evaluate(self, position: Position, stop: Stop) -> EpochRow:
        rows = [SubnetRow(position.epoch, position.step, *one) for one in self._accuracies(self.model, stop)]
        averaged = None if self.average is None else self._accuracies(self.average, stop)
        row = self.row(
            position,
            accuracy=rows[-1].accuracy,
            ema_accuracy=None if averaged is None else averaged[-1][1],
            flops=1.0,
            params=1.0,
            live=0,
            gates=0,
            settled=True,
        )
        if self.world.main:
            self.folder.add(row)
            self.folder.add_subnets(rows)
        return row

    def _accuracies(self, model: nn.Module, stop: Stop) -> list[tuple[str, float]]:
        found = []
        for name in [row.structure.name for row in subnets.status(model).rows]:
            with subnets.active(model, name):
                found.append((name, self.accuracy(model, stop)))
        return found

    def finish(self, row: EpochRow) -> Result:
        """Save the switchable network, with the accuracy and the time of each subnet."""
        model = (self.model if self.average is None else self.average).eval()
        accuracies = dict(self._accuracies(model, lambda: False))
        info = self.info
        result = Result(
            row.step, info.steps, info.flops, info.params, info.flops, info.params, {}, row.accuracy,
            data_config_of(model),
        )  # fmt: skip
        if self.world.main:
            timed = {one.structure.name: one.seconds for one in subnets.status(model, latency=True).rows}
            sizes = [
                replace(size, accuracy=accuracies[size.name], seconds=timed[size.name])
                for size in self.folder.subnet_sizes()
            ]
            self.folder.write_subnet_sizes(sizes)
            save(model, self.folder.switchable_file)
            result = replace(result, accuracy=accuracies[sizes[-1].name])
            self.folder.finish(result)
        self.world.wait()
        return result


def describe_widths(
    recipe: Recipe, data: DataSets, model: nn.Module, world: World
) -> tuple[RunInfo, nn.Module]:  # fmt: skip
    """What run.json says of a run, and the dense model's copy with gates, which has the channel map."""
    config, classes = config_for(recipe, data, model)
    loading, size = loaders(data, recipe.images, config, world), tuple(config["input_size"])
    prepared = with_gates(copy.deepcopy(model), replace(recipe.budget, flops=1.0), size, 1, 1, recipe.method)
    info = info_of(recipe, data, loading, world, sizes_of(prepared), classes, size)
    return replace(info, gates=0, targets={}), prepared


def _size(structure: subnets.Structure, channel_map: ChannelMap) -> SubnetSize:
    layers = layers_of(channel_map, structure.live(channel_map))
    shares = structure.shares
    return SubnetSize(structure.name, shares["FLOPs"], shares["parameters"], tuple(layer.outputs for layer in layers))
