"""Finalize a run's model: between two epochs once the targets are met, or else at the end.

What the run folder says about the gates is from then on a `Snapshot` of that moment. A checkpoint keeps the bank's
state of that moment too. To resume, the dense model is built and prepared, gets that state and is finalized: this gives
the slim model and the optimizer that the rest of the checkpoint fits.
"""

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
        flops, params: FLOPs and parameters that are left.
        shares: share of each resource with a target that is left.
        live: number of live gates.
        settled: whether the targets are met.
        histogram: number of live gates in each of `BINS` equal parts of [0, 1].
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
        """The snapshot of a model with gates."""
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
        """The line of `gates.jsonl` that belongs to `row`."""
        return GateRow(row.epoch, row.step, row.gates - self.live, self.histogram, self.inputs, self.outputs)

    def result(self, slim: nn.Module, info: RunInfo, step: int) -> Result:
        """The result for the slim model after `step` steps, without an accuracy."""
        params = sum(parameter.numel() for parameter in slim.parameters())
        return Result(step, info.steps, self.flops, params, info.flops, info.params, self.shares)


@dataclass(frozen=True, eq=False)
class FinalGates:
    """The gates of a run at the moment when its model was finalized.

    Attributes:
        snapshot: the gates just before. They no longer change.
        bank_state: the bank's state_dict just before. With it, a resumed run removes the same channels.
    """

    snapshot: Snapshot
    bank_state: Mapping[str, Tensor]


def finalize_run(
    model: nn.Module, average: nn.Module | None = None, optimizer: Optimizer | None = None, warn: bool = True
) -> FinalGates:
    """Finalize a run's model, and the average of its weights with it.

    Args:
        model: a model with gates.
        average: the average of the model. The same classes are dead in both.
        optimizer: the optimizer that trains the model; it continues with the slim model.
        warn: whether to warn if the targets are not met.

    Raises:
        AutogateError: see `autogate.finalize`.
    """
    found = FinalGates(Snapshot.of(model), {name: value.clone() for name, value in gates(model).state_dict().items()})
    finalize(model, optimizer=optimizer, warn=warn)
    if average is not None:
        finalize(average, warn=False)
    return found


def finalize_run_again(
    model: nn.Module, state: Mapping[str, Tensor], average: nn.Module | None = None, optimizer: Optimizer | None = None
) -> FinalGates:
    """Like `finalize_run`, for a model prepared again to resume from a checkpoint. Its gates are in `state`."""
    for one in (model, average):
        if one is not None:
            gates(one).load_state_dict(state)
    return finalize_run(model, average, optimizer)
