"""The gates of a run as they stand, and the step from the gated to the slim model in the middle of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autogate.api import finalize, gates, summary
from autogate.training.run_folder import BINS, EpochRow, GateRow, Result, RunInfo


@dataclass(frozen=True)
class Snapshot:
    """The gates at one moment, and what they leave of the model.

    Attributes:
        flops, params: that are left.
        shares: that are left of each resource with a target.
        live: gates that are alive.
        settled: whether the targets have been met.
        histogram: how many of the living lie in each of `BINS` equal parts of [0, 1].
        inputs, outputs: channels left of each layer, in the order of `RunInfo.layers`.
    """

    flops: float
    params: int
    shares: Mapping[str, float]
    live: int
    settled: bool
    histogram: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Of a model that has gates."""
        bank, whole = gates(model), summary(model)
        now = whole.progress
        return cls(
            flops=whole.flops,
            params=whole.params,
            shares=now.shares,
            live=now.classes - now.dead,
            settled=now.settled,
            histogram=tuple(int(count) for count in torch.histc(bank.gates()[bank.live].cpu(), BINS, 0, 1)),
            inputs=tuple(layer.inputs for layer in whole.layers),
            outputs=tuple(layer.outputs for layer in whole.layers),
        )

    def gate_row(self, row: EpochRow) -> GateRow:
        """What `gates.jsonl` has of it, beside `row`."""
        return GateRow(row.epoch, row.step, row.gates - self.live, self.histogram, self.inputs, self.outputs)

    def result(self, slim: nn.Module, info: RunInfo, step: int) -> Result:
        """What the slim model came to after `step` steps, before it is tried on images."""
        params = sum(parameter.numel() for parameter in slim.parameters())
        return Result(step, info.steps, self.flops, params, info.flops, info.params, self.shares)


@dataclass(frozen=True, eq=False)
class FinalGates:
    """A run's closed channels, once they are taken out.

    Attributes:
        snapshot: the gates just before: they are as they were, for good.
        gates: the bank's state_dict just before, which lets a run that goes on take out the same channels.
    """

    snapshot: Snapshot
    gates: Mapping[str, Tensor]


def finalize_run(
    model: nn.Module, average: nn.Module | None = None, optimizer: Optimizer | None = None, warn: bool = True
) -> FinalGates:
    """Finalize a run's model, and the average of its weights with it.

    Args:
        model: with gates, trained by `optimizer`.
        average: of the model; what is dead in one is dead in the other.
        optimizer: it goes on with the slim model.
        warn: where the targets have not been met.

    Raises:
        AutogateError: as `autogate.finalize` does.
    """
    found = FinalGates(Snapshot.of(model), {name: value.clone() for name, value in gates(model).state_dict().items()})
    finalize(model, optimizer=optimizer, warn=warn)
    if average is not None:
        finalize(average, warn=False)
    return found


def finalize_run_again(
    model: nn.Module, state: Mapping[str, Tensor], average: nn.Module | None = None, optimizer: Optimizer | None = None
) -> FinalGates:
    """As `finalize_run`, of a model that was prepared anew for a checkpoint: its gates are in `state`."""
    for one in (model, average):
        if one is not None:
            gates(one).load_state_dict(state)
    return finalize_run(model, average, optimizer)
