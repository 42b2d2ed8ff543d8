"""Finalize a run's model: between two epochs once the targets are met, or else at the end.

What the run folder says about the gates is from then on a `Snapshot` of that moment. A checkpoint keeps the bank's
state of that moment and the record of the slimming. To resume, the dense model is built and prepared, gets that state
and is slimmed as recorded: this gives the slim model and the optimizer that the rest of the checkpoint fits. The record
is needed because some decisions look at the weights, which the model has only once the checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autogate.api import finalize, finalize_as, gated_summary, gates
from autogate.files import data_config_of
from autogate.slim import Slimming, history_of
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
        bank, whole = gates(model), gated_summary(model)
        now = bank.progress()
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
        params, history = sum(parameter.numel() for parameter in slim.parameters()), history_of(slim)
        assert history is not None
        return Result(
            step, info.steps, self.flops, params, info.flops, info.params, self.shares,
            data_config=data_config_of(slim), removed=history.removed, rewritten=history.rewritten,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class FinalGates:
    """The gates of a run at the moment when its model was finalized.

    Attributes:
        snapshot: the gates just before. They no longer change.
        bank_state: the bank's state_dict just before.
        slimmings: how the model was slimmed, and the average of its weights if there is one.
    """

    snapshot: Snapshot
    bank_state: Mapping[str, Tensor]
    slimmings: tuple[Slimming, ...]


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
    snapshot = Snapshot.of(model)
    state = {name: value.clone() for name, value in gates(model).state_dict().items()}
    finalize(model, optimizer=optimizer, warn=warn)
    if average is not None:
        finalize(average, warn=False)
    done = (history_of(one) for one in (model, average) if one is not None)
    return FinalGates(snapshot, state, tuple(history.slimmings[-1] for history in done if history is not None))


def finalize_run_again(
    model: nn.Module, state: Mapping[str, Tensor], slimmings: Sequence[Slimming], average: nn.Module | None = None,
    optimizer: Optimizer | None = None,
) -> FinalGates:  # fmt: skip
    """Like `finalize_run`, for a model prepared again to resume from a checkpoint.

    Args:
        model, average, optimizer: as for `finalize_run`.
        state, slimmings: as in `FinalGates`.
    """
    gates(model).load_state_dict(state)
    snapshot = Snapshot.of(model)
    finalize_as(model, slimmings[0], optimizer=optimizer)
    if average is not None:
        finalize_as(average, slimmings[-1])
    return FinalGates(snapshot, state, tuple(slimmings))
