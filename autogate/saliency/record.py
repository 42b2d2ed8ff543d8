"""What a file says of a model that chooses its channels for each image: how its saliency modules are added again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autogate.saliency.bank import SaliencyBank
from autogate.saliency.counting import Counting, MeanUse
from autogate.saliency.kinds import Kind
from autogate.saliency.run import Run, RunState
from autogate.saliency.sites import Scaling
from autogate.slim import Analysed, check_same, describe
from rewriters import ALWAYS


@dataclass(frozen=True)
class RecordedLayer:
    """A convolution or linear layer of a recorded model.

    Attributes:
        path: of the module.
        kind: what is computed of it, see `CountedLayer`.
        scaling: where its output is scaled, for one that chooses or follows.
        hidden: rows of W1 of its saliency module, for one that has it.
        prepared: as in `CountedLayer`.
        zero_inputs, zero_outputs: the channels that are zero where all the layers that make them are off.
    """

    path: str
    kind: Kind
    scaling: Scaling | None
    hidden: int
    prepared: float | None
    zero_inputs: tuple[int, ...]
    zero_outputs: tuple[int, ...]


@dataclass(frozen=True)
class Choosing(Analysed):
    """A model that was given saliency modules, as plain data.

    Attributes:
        run: the course of its training.
        layers: all of its layers, in the order they run.
        checksum: of its layers and their channels (`Counting.checksum`).
        prepared_rest: as in `Counting`.
        measured: as of the bank.
    """

    run: Run
    layers: tuple[RecordedLayer, ...]
    checksum: int
    prepared_rest: float | None = None
    measured: tuple[RunState, MeanUse] | None = None


def record_of(model: nn.Module, bank: SaliencyBank) -> Choosing:
    """The record of a model as it is now; `bank` is its saliency bank."""
    options = bank.origin.options.on(bank.origin.calls_for(model))
    before, _ = describe(model, options, (), bank.added)
    counting = bank.counting
    return Choosing(
        **vars(before),
        run=bank.run,
        layers=_recorded(counting),
        checksum=counting.checksum(),
        prepared_rest=counting.prepared_rest,
        measured=bank.measured,
    )


def check_recorded(counting: Counting, record: Choosing) -> None:
    """Raise unless a model's layers choose and are coupled like those that a record has.

    Raises:
        AutogateError: they don't.
    """
    mine, theirs = _recorded(counting), record.layers
    check_same("the set of layers", [one.path for one in mine], [one.path for one in theirs])
    for here, there in zip(mine, theirs, strict=True):
        check_same(f"what {here.path} computes for each image", here, there)
    check_same("the set of channels that choose", counting.checksum(), record.checksum)


def as_prepared(counting: Counting, record: Choosing) -> Counting:
    """Count forwards beside the model that the recorded one was before channels were removed."""
    pairs = zip(counting.layers, record.layers, strict=True)
    layers = tuple(replace(layer, prepared=there.prepared) for layer, there in pairs)
    return replace(counting, layers=layers, prepared_rest=record.prepared_rest)


def recorded_zero(classes: Sequence[tuple[Tensor, Tensor]], size: int, record: Choosing) -> Tensor:
    """The classes that are zero where all the layers that make them are off, as a record says; see `Counting`.

    Args:
        classes: of each layer, those of its inputs and outputs.
        size: number of classes.
        record: of a model with the same layers.
    """
    zero = torch.zeros(size + 1, dtype=torch.bool)
    check_same("the number of layers", len(classes), len(record.layers))
    for (inputs, outputs), layer in zip(classes, record.layers, strict=True):
        zero[inputs[list(layer.zero_inputs)]] = True
        zero[outputs[list(layer.zero_outputs)]] = True
    zero[ALWAYS] = False
    return zero[:-1]


def _recorded(counting: Counting) -> tuple[RecordedLayer, ...]:
    zero = torch.cat([counting.zero, counting.zero.new_zeros(1)])  # the last entry is that of class -1

    def zeros(classes: Tensor) -> tuple[int, ...]:
        return tuple(torch.nonzero(zero[classes]).flatten().tolist())

    return tuple(
        RecordedLayer(
            layer.path, layer.kind, layer.scaling, layer.own // (len(layer.inputs) + len(layer.outputs)),
            layer.prepared, zeros(layer.inputs), zeros(layer.outputs),
        )
        for layer in counting.layers
    )  # fmt: skip
